# ODSI: one Makefile, no recursion. `make help` lists the targets.
#   CUDA=0|1             leave the CUDA backend out, or insist on it (default: when nvcc is there)
#   SAN=address,undefined | thread    build and test with sanitizers, in a build folder of its own
#   V=1                  show the commands

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

CC ?= gcc
ifeq ($(origin CC),default)
CC := gcc
endif
comma := ,
VARIANT := $(if $(SAN),san-$(subst $(comma),-,$(SAN)),release)
BUILD := build/$(VARIANT)
BIN := $(BUILD)/bin
LIB := $(BUILD)/lib
GEN := $(BUILD)/gen
Q := $(if $(V),,@)
say = $(if $(V),,@printf '  %-8s %s\n' $(1) '$(2)';)

WARNINGS := -Wall -Wextra -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wold-style-definition \
  -Wpointer-arith -Wwrite-strings -Wformat=2 -Wundef -Wvla -Wnull-dereference -Wdouble-promotion \
  -Wimplicit-fallthrough -Wcast-align -Wno-missing-field-initializers -Wno-format-truncation \
  -Werror
# The arithmetic is part of the protocol (kernels/NUMERICS.md): no contraction, no fast-math.
EXACT := -ffp-contract=off -fno-fast-math -fno-unsafe-math-optimizations
SANFLAGS := $(if $(SAN),-fsanitize=$(SAN) -fno-omit-frame-pointer -fno-sanitize-recover=all)
OPTIMIZE := $(if $(SAN),-O1,-O2)
CFLAGS := -std=c11 -D_GNU_SOURCE $(OPTIMIZE) -g $(WARNINGS) $(EXACT) $(SANFLAGS) -pthread \
  -fstack-protector-strong $(if $(SAN),,-D_FORTIFY_SOURCE=2)
CPPFLAGS := -I. -I$(GEN)
DEPFLAGS = -MMD -MP -MF $(@:.o=.d)
LDFLAGS := -pthread $(SANFLAGS)

# ---- what is built from where (design: one folder, one library) --------------------------------
C_base := $(wildcard common/base/*.c)
C_crypto := $(wildcard common/crypto/*.c)
C_wire := $(wildcard common/wire/*.c)
C_net := $(wildcard common/net/*.c)
C_kernels := $(wildcard kernels/*.c kernels/ref/*.c kernels/cpu/*.c)
C_model := $(wildcard worker/model/*.c)
C_engine := $(wildcard worker/engine/*.c)
C_hop := $(wildcard worker/hop/*.c)
C_gateway := $(filter-out worker/gateway/main.c,$(wildcard worker/gateway/*.c))
C_cli := $(filter-out worker/cli/main.c,$(wildcard worker/cli/*.c))
C_coordinator := $(filter-out coordinator/main.c,$(wildcard coordinator/*.c))
C_support := $(filter-out tests/support/tsan_arena.c,$(wildcard tests/support/*.c))
LIBRARIES := base crypto wire net kernels model engine hop gateway cli coordinator support

PROTOS := $(wildcard proto/odsi/v1/*.proto proto/grpc/*/*/*.proto)
PB_C := $(PROTOS:proto/%.proto=$(GEN)/%.pb-c.c)
PB_H := $(PB_C:.c=.h)
PB_O := $(PB_C:.c=.o)

objects = $(patsubst %.c,$(BUILD)/obj/%.o,$(1))
archive = $(LIB)/lib$(1).a

# Which libraries each program needs, users before what they use.
NEEDS_engine := engine model kernels crypto base
NEEDS_net := net proto wire crypto base
NEEDS_worker := hop engine model kernels net proto wire crypto base
NEEDS_gateway := gateway engine model net kernels proto wire crypto base
NEEDS_coordinator := coordinator net proto wire crypto base
NEEDS_cli := cli gateway engine model kernels net proto wire crypto base
SYS_crypto := -lcrypto -lm
SYS_model := -ljansson -lpcre2-8 $(SYS_crypto)
SYS_net := -lgrpc -lgpr -lprotobuf-c -lssl -lcrypto -lm
SYS_all := -lsqlite3 -ljansson -lpcre2-8 $(SYS_net)

PROGRAMS := $(BIN)/odsi-worker $(BIN)/odsi-gateway $(BIN)/odsi-coordinator $(BIN)/odsi
have_main = $(if $(wildcard $(1)),$(2))
BUILT := $(call have_main,worker/main.c,$(BIN)/odsi-worker) \
  $(call have_main,worker/gateway/main.c,$(BIN)/odsi-gateway) \
  $(call have_main,coordinator/main.c,$(BIN)/odsi-coordinator) \
  $(call have_main,worker/cli/main.c,$(BIN)/odsi)

.PHONY: all
all: $(BUILT)

# ---- compiling ----------------------------------------------------------------------------------
# Kernels of one instruction set carry its name in front; only they get its flags.
AVX2FLAGS := -mavx2 -mfma -mf16c
AVX512FLAGS := -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mfma -mf16c
$(BUILD)/obj/kernels/cpu/avx2_%.o: ISAFLAGS := $(AVX2FLAGS)
$(BUILD)/obj/kernels/cpu/avx512_%.o: ISAFLAGS := $(AVX512FLAGS)
# The reference compiled again where fma is one instruction (kernels/cpu/fma_loops.c).
$(BUILD)/obj/kernels/cpu/fma_%.o: ISAFLAGS := -mfma
$(BUILD)/obj/kernels/%.o: KERNELFLAGS := $(if $(SAN),-O2,-O3)
$(BUILD)/obj/worker/model/quantizer%.o: KERNELFLAGS := $(if $(SAN),-O2,-O3)

$(BUILD)/obj/%.o: %.c
	@mkdir -p $(@D)
	$(call say,CC,$<)$(CC) $(CPPFLAGS) $(CFLAGS) $(KERNELFLAGS) $(ISAFLAGS) $(DEPFLAGS) -c $< -o $@

# Generated headers must exist before anything that includes them compiles.
PB_USERS := $(C_net) $(C_wire) $(C_hop) $(C_gateway) $(C_cli) $(C_coordinator) $(C_support) \
  worker/main.c worker/gateway/main.c worker/cli/main.c coordinator/main.c \
  $(wildcard tests/unit/*/*.c tests/integration/*.c tests/bench/*.c tests/fuzz/*.c)
$(call objects,$(PB_USERS)): | $(PB_H)

$(GEN)/%.pb-c.c $(GEN)/%.pb-c.h: proto/%.proto
	@mkdir -p $(@D)
	$(call say,PROTO,$<)protoc-c --proto_path=proto --c_out=$(GEN) $(<:proto/%=%)
$(GEN)/%.pb-c.o: $(GEN)/%.pb-c.c $(PB_H)
	$(Q)$(CC) $(CPPFLAGS) -std=c11 $(OPTIMIZE) -g $(SANFLAGS) -w -c $< -o $@
.SECONDARY: $(PB_C) $(PB_H)
$(GEN)/descriptors.pb: $(PROTOS)
	@mkdir -p $(@D)
	$(Q)protoc --proto_path=proto --include_imports --descriptor_set_out=$@ $(^:proto/%=%)
# The same as the numbers of a C array: server reflection carries it in the program.
$(GEN)/descriptors.inc: $(GEN)/descriptors.pb
	$(Q)od -An -v -tu1 $< | sed 's/\([0-9][0-9]*\)/\1,/g' >$@
$(BUILD)/obj/common/net/rpc_descriptor.o: $(GEN)/descriptors.inc

# The commit a binary was built from; rewritten only when it changes.
.PHONY: always
$(GEN)/odsi_version.h: always
	@mkdir -p $(@D)
	@commit=$$(git describe --always --dirty 2>/dev/null); \
	  line="#define ODSI_VERSION_TEXT \"odsi 0.1.0$${commit:+ ($$commit)}\""; \
	  [ "$$line" = "$$(cat $@ 2>/dev/null)" ] || printf '%s\n' "$$line" >$@
$(BUILD)/obj/common/base/args.o: $(GEN)/odsi_version.h

define library
$(call archive,$(1)): $(call objects,$(C_$(1)))
	@mkdir -p $$(@D)
	@rm -f $$@
	$$(call say,AR,$$@)ar rcs $$@ $$^
endef
$(foreach name,$(LIBRARIES),$(eval $(call library,$(name))))
$(LIB)/libproto.a: $(PB_O)
	@mkdir -p $(@D)
	@rm -f $@
	$(call say,AR,$@)ar rcs $@ $^

archives = $(foreach name,$(1),$(LIB)/lib$(name).a)
link = $(call say,LINK,$@)$(CC) -o $@ $(filter %.o,$^) -Wl,--start-group $(filter %.a,$^) \
  -Wl,--end-group $(LDFLAGS)

$(BIN)/odsi-worker: $(call objects,worker/main.c) $(call archives,$(NEEDS_worker))
	@mkdir -p $(@D)
	$(link) -ljansson -lpcre2-8 $(SYS_net)
$(BIN)/odsi-gateway: $(call objects,worker/gateway/main.c) $(call archives,$(NEEDS_gateway))
	@mkdir -p $(@D)
	$(link) -ljansson -lpcre2-8 $(SYS_net)
$(BIN)/odsi-coordinator: $(call objects,coordinator/main.c) $(call archives,$(NEEDS_coordinator))
	@mkdir -p $(@D)
	$(link) -lsqlite3 $(SYS_net)
$(BIN)/odsi: $(call objects,worker/cli/main.c) $(call archives,$(NEEDS_cli))
	@mkdir -p $(@D)
	$(link) -ljansson -lpcre2-8 $(SYS_net)

# ---- tests --------------------------------------------------------------------------------------
# One program per folder of tests/unit, one per file of tests/integration; all are Criterion.
UNIT_FOLDERS := $(notdir $(patsubst %/,%,$(sort $(dir $(wildcard tests/unit/*/test_*.c)))))
UNIT_TESTS := $(UNIT_FOLDERS:%=$(BUILD)/tests/unit_%)
KERNEL_TESTS := $(if $(wildcard tests/kernels/*.c),$(BUILD)/tests/kernels)
INTEGRATION_TESTS := $(patsubst tests/integration/%.c,$(BUILD)/tests/integration_%,\
  $(wildcard tests/integration/test_*.c))
NEEDS_test := support hop gateway coordinator cli engine model kernels net proto wire crypto base

TSAN_ARENA := $(if $(filter thread,$(SAN)),$(BUILD)/obj/tests/support/tsan_arena.o)

# These two must link and run without gRPC, protobuf or a network (design: worker/model and
# worker/engine can be carried to a machine that has none of them).
NEEDS_unit_engine := $(NEEDS_engine)
NEEDS_unit_model := $(NEEDS_engine)
SYS_unit_engine := $(SYS_model)
SYS_unit_model := $(SYS_model)
define unit_test
$(BUILD)/tests/unit_$(1): $(call objects,$(wildcard tests/unit/$(1)/*.c)) $(TSAN_ARENA) \
  $(call archives,$(or $(NEEDS_unit_$(1)),$(NEEDS_test)))
	@mkdir -p $$(@D)
	$$(link) -lcriterion $(or $(SYS_unit_$(1)),$(SYS_all))
endef
$(foreach folder,$(UNIT_FOLDERS),$(eval $(call unit_test,$(folder))))
$(BUILD)/tests/kernels: $(call objects,$(wildcard tests/kernels/*.c)) $(TSAN_ARENA) \
  $(call archives,engine kernels crypto base)
	@mkdir -p $(@D)
	$(link) -lcriterion $(SYS_crypto)
$(BUILD)/tests/integration_%: $(BUILD)/obj/tests/integration/%.o $(TSAN_ARENA) \
  $(call archives,$(NEEDS_test))
	@mkdir -p $(@D)
	$(link) -lcriterion $(SYS_all)

# ---- benchmarks: one program per file of tests/bench --------------------------------------------
$(BUILD)/bench/bench_kernels: $(call objects,tests/bench/bench_kernels.c) \
  $(call archives,kernels crypto base)
	@mkdir -p $(@D)
	$(link) $(SYS_crypto)
$(BUILD)/bench/bench_load: $(call objects,tests/bench/bench_load.c) \
  $(call archives,$(filter-out engine,$(NEEDS_engine)))
	@mkdir -p $(@D)
	$(link) $(SYS_model)
$(BUILD)/bench/bench_rpc: $(call objects,tests/bench/bench_rpc.c) $(call archives,$(NEEDS_net))
	@mkdir -p $(@D)
	$(link) $(SYS_net)
# ---- targets for people -------------------------------------------------------------------------
# What a target needs installed comes first, and only then is anything asked about: the part of it
# that builds is a second make, which sees the machine as setup left it and uses all cores.
JOBS ?= $(shell nproc)
again = $(MAKE) --no-print-directory $(if $(filter -j%,$(MAKEFLAGS)),,-j$(JOBS))
ifndef ODSI_MAKE_START
export ODSI_MAKE_START := $(shell date +%s)
endif
PREFIX ?= /usr/local

.PHONY: help
help: ## list these targets
	@echo 'make TARGET [SAN=address,undefined|thread] [CUDA=0|1] [V=1]'
	@awk -F ':[^#]*## ' '/^[a-z-]+:[^#=]*## /{printf "  %-14s %s\n", $$1, $$2}' Makefile

.PHONY: setup
setup: ## install the Debian packages that are missing
	@deploy/setup

.PHONY: run
run: setup ## start a local swarm of three workers and let it write a story
	@$(again) all
	@$(BIN)/odsi local --workers 3 --model deploy/demo/odsi-tiny-q8_0.gguf --threads 1 -- \
	  $(BIN)/odsi generate --echo --hops --prompt 'Once upon a time'
	@echo "make run: $$(($$(date +%s) - ODSI_MAKE_START)) s from typing it to the end"

# CUDA kernels are optional: say so when they are left out, and insist on them with CUDA=1.
.PHONY: cuda-note
cuda-note:
ifneq ($(wildcard kernels/cuda/*.cu),)
ifeq ($(shell command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null),)
	$(if $(filter 1,$(CUDA)),$(error CUDA=1, but nvcc is neither in PATH nor in /usr/local/cuda/bin))
	@echo 'no nvcc here: the CUDA kernels are neither built nor tested'
endif
endif

CHECKS := tidy=tests/tidy/tidy.py test_tidy=tests/tidy/test_tidy.py
TEST_PROGRAMS := $(UNIT_TESTS) $(KERNEL_TESTS) $(INTEGRATION_TESTS)
.PHONY: test tests-built
tests-built: all $(TEST_PROGRAMS) check-headers
test: setup cuda-note ## build and run every test that this machine can run
	@$(again) tests-built
	@tests/run.py --build $(BUILD) $(if $(SAN),--limit 2700) $(CHECKS) \
	  $(foreach program,$(TEST_PROGRAMS),$(notdir $(program))=$(program))

TOKENIZER_IDS := $(BUILD)/tests/tokenizer_ids
$(TOKENIZER_IDS): $(call objects,tests/interop/tokenizer_ids.c) \
  $(call archives,model kernels crypto base)
	@mkdir -p $(@D)
	$(link) $(SYS_model)

.PHONY: exact
exact: setup ## every family in every weight type, every way to run it: one set of bits
	@$(again) $(BUILD)/tests/unit_engine
	@ODSI_EXACT=full $(BUILD)/tests/unit_engine --filter 'families/*' --jobs $(JOBS)

.PHONY: interop interop-built
interop-built: all $(TOKENIZER_IDS)
interop: setup ## compare with software from npm: a stock gRPC client, real tokenizers, llama.cpp
	@$(again) interop-built
	@tests/interop/run $(BUILD)

# Every header compiles alone, those that CUDA sources include also as C++.
HEADERS := $(wildcard $(foreach folder,common/* kernels kernels/* worker/* coordinator tests/*,\
  $(folder)/*.h))
CXX_HEADERS := $(wildcard kernels/*.h common/base/*.h)
.PHONY: check-headers headers-c headers-c++
check-headers: headers-c headers-c++ ## compile every header alone
headers-c: $(HEADERS:%=$(BUILD)/headers/c/%.ok)
headers-c++: $(CXX_HEADERS:%=$(BUILD)/headers/c++/%.ok)
check_header = @mkdir -p $(@D); $(1) $(CPPFLAGS) -Wall -Wextra -Werror -fsyntax-only -MMD -MP \
  -MF $(@:.ok=.d) -MT $@ -include $< -x $(2) /dev/null && touch $@
$(BUILD)/headers/c/%.ok: % | $(PB_H)
	$(call check_header,$(CC) -std=c11 -D_GNU_SOURCE -Wstrict-prototypes,c)
$(BUILD)/headers/c++/%.ok: %
	$(call check_header,$(CXX) -std=c++17,c++)

.PHONY: tidy
tidy: ## check the rules of the house: names, lengths, includes, banned calls
	@tests/tidy/tidy.py

SOURCES := $(filter-out build/%,$(shell git ls-files '*.c' '*.h' '*.cu' '*.cuh' 2>/dev/null))
.PHONY: setup-dev check-style analyze valgrind
setup-dev:
	@deploy/setup --dev
check-style: ## compare every source with .clang-format
	@deploy/setup --style
	@clang-format --dry-run -Werror $(SOURCES)
	@echo 'check-style: $(words $(SOURCES)) files are formatted'

# Tests are left out: the analyzer does not know that cr_assert ends a test.
analyze: setup-dev ## static analysis of the programs (clang-tidy, .clang-tidy)
	@$(again) analyzed
.PHONY: analyzed
analyzed: $(patsubst %,$(BUILD)/analyze/%.ok,$(filter-out tests/%,$(filter %.c,$(SOURCES))))
	@echo 'analyze: nothing found in $(words $^) files'
$(BUILD)/analyze/kernels/cpu/avx2_%.ok: ISAFLAGS := $(AVX2FLAGS)
$(BUILD)/analyze/kernels/cpu/avx512_%.ok: ISAFLAGS := $(AVX512FLAGS)
$(BUILD)/analyze/%.ok: % .clang-tidy | $(PB_H) $(GEN)/odsi_version.h $(GEN)/descriptors.inc
	@mkdir -p $(@D)
	$(call say,TIDY,$<)clang-tidy --quiet $< -- -std=c11 -D_GNU_SOURCE $(CPPFLAGS) $(ISAFLAGS) \
	  2>$(@:.ok=.log) || { cat $(@:.ok=.log) >&2; exit 1; }
	@touch $@

VALGRIND := valgrind -q --trace-children=yes --leak-check=full --errors-for-leak-kinds=definite \
  --show-leak-kinds=definite --error-exitcode=9
VALGRIND_TESTS := $(filter %/unit_base %/unit_crypto %/unit_model %/unit_engine,$(UNIT_TESTS))
valgrind: setup-dev ## run the unit tests of base, crypto, model and engine under valgrind
	@$(again) $(VALGRIND_TESTS)
	@tests/run.py --build $(BUILD) --limit 1800 --title valgrind \
	  $(foreach program,$(VALGRIND_TESTS),valgrind_$(notdir $(program))="$(VALGRIND) $(program)")

BENCHES := $(BUILD)/bench/bench_kernels $(BUILD)/bench/bench_rpc
.PHONY: bench benches-built
benches-built: $(BENCHES)
bench: setup ## measure kernels, hops and a local swarm on this machine
	@$(again) all benches-built
	@for program in $(BENCHES); do $$program || exit 1; done
	@tests/bench/bench_swarm.py --build $(BUILD)

# libFuzzer over every tests/fuzz/fuzz_*.c. Seeds are in tests/vectors/fuzz_*; what it finds on the
# way is kept in build/fuzz, so the next run goes on from there; a crash stays there too.
FUZZ_SECONDS ?= 60
NEEDS_fuzz_gguf := model kernels crypto base
NEEDS_fuzz_safetensors := model kernels crypto base
NEEDS_fuzz_tokenizer := model crypto base
NEEDS_fuzz_chat := model crypto base
FUZZERS := $(basename $(notdir $(wildcard tests/fuzz/fuzz_*.c)))
.PHONY: fuzz fuzzed
fuzz: setup-dev ## fuzz what reads bytes of strangers, FUZZ_SECONDS (60) for each reader
	@$(again) SAN=fuzzer-no-link,address,undefined CC=clang WARNINGS=-w fuzzed
fuzzed: $(FUZZERS:%=$(BUILD)/tests/%)
	@for name in $(FUZZERS); do mkdir -p build/fuzz/$$name; \
	  echo "$$name: $(FUZZ_SECONDS) s"; \
	  $(BUILD)/tests/$$name -max_total_time=$(FUZZ_SECONDS) -timeout=10 -rss_limit_mb=2048 \
	    -max_len=65536 -print_final_stats=1 -verbosity=0 -artifact_prefix=build/fuzz/$$name- \
	    build/fuzz/$$name $$(ls -d tests/vectors/$$name 2>/dev/null) || exit 1; \
	done
define fuzzer
$(BUILD)/tests/$(1): $(BUILD)/obj/tests/fuzz/$(1).o \
  $(call archives,$(if $(NEEDS_$(1)),$(NEEDS_$(1)),$(filter-out support,$(NEEDS_test))))
	@mkdir -p $$(@D)
	$$(link) -fsanitize=fuzzer $(if $(NEEDS_$(1)),$(SYS_model),$(SYS_all))
endef
$(foreach name,$(FUZZERS),$(eval $(call fuzzer,$(name))))

.PHONY: install
install: all ## copy the programs to $(DESTDIR)$(PREFIX)/bin
	install -d $(DESTDIR)$(PREFIX)/bin
	install -m 755 $(BUILT) $(DESTDIR)$(PREFIX)/bin

.PHONY: clean
clean: ## remove everything that was built
	rm -rf build

-include $(shell find $(BUILD) -name '*.d' 2>/dev/null)
