/* odsi-worker as its owner meets it: every wrong start ends with one line that says what to do. */
#include "tests/support/process.h"

#include "common/base/alloc.h"
#include "common/base/io.h"

#include <criterion/criterion.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define MODEL   "deploy/demo/odsi-tiny-q8_0.gguf"
#define WAIT_US 20000000u
#define NOBODY  "127.0.0.1:1"

struct fixture {
    char folder[PROCESS_PATH_SIZE];
    char state[PROCESS_PATH_SIZE + 16];
    uint32_t run_count;
};

static void set_up(struct fixture *f)
{
    memset(f, 0, sizeof *f);
    cr_assert_eq(process_folder_make(f->folder), ODSI_OK);
    snprintf(f->state, sizeof f->state, "--state-dir=%s/state", f->folder);
}

static struct process *start(struct fixture *f, const char *const *args)
{
    struct process *process = NULL;
    const char *all[24] = {f->state, "--threads=1"};
    char name[32];
    size_t count = 2;
    for (size_t i = 0; args[i]; i++) {
        cr_assert_lt(count + 1, 24);
        all[count++] = args[i];
    }
    snprintf(name, sizeof name, "run-%u", f->run_count++);
    const struct process_config config = {
        .program = "odsi-worker", .args = all, .folder = f->folder, .name = name};
    cr_assert_eq(process_start(&process, &config), ODSI_OK, "%s", odsi_err_text());
    return process;
}

/* The last line names word, and nothing is said twice as an error. */
static void expect_end(struct fixture *f, const char *const *args, int code, const char *word)
{
    int ended = -1;
    char *log = NULL;
    struct process *process = start(f, args);
    cr_assert_eq(process_wait(process, WAIT_US, &ended), ODSI_OK, "it runs on; expected: %s", word);
    cr_assert_eq(process_read_log(&log, process), ODSI_OK);
    cr_expect_eq(ended, code, "%d: %s", ended, log);
    cr_expect(strstr(log, word) != NULL, "\"%s\" does not mention \"%s\"", log, word);
    alloc_free(log);
    process_close(&process);
}

Test(worker, says_what_is_missing_or_wrong_in_its_flags, .timeout = 60)
{
    struct fixture f;
    const char *const no_model[] = {"--coordinator", NOBODY, NULL};
    const char *const no_coordinator[] = {"--model", MODEL, NULL};
    const char *const layers[] = {"--model", MODEL, "--coordinator", NOBODY, "--layers", "3", NULL};
    const char *const backwards[] = {"--model", MODEL, "--coordinator", NOBODY, "--layers",
                                     "5-2",     NULL};
    const char *const gpu[] = {"--model", MODEL, "--coordinator", NOBODY, "--gpu", "0", NULL};
    const char *const listen[] = {"--model",   MODEL, "--coordinator", NOBODY, "--listen",
                                  "127.0.0.1", NULL};
    const char *const unknown[] = {"--nonsense", NULL};
    const char *const stray[] = {"stray", NULL};
    set_up(&f);
    expect_end(&f, no_model, 2, "--model");
    expect_end(&f, no_coordinator, 2, "--coordinator");
    expect_end(&f, layers, 2, "--layers 3");
    expect_end(&f, backwards, 2, "--layers 5-2");
    expect_end(&f, gpu, 2, "CUDA");
    expect_end(&f, listen, 2, "127.0.0.1");
    expect_end(&f, unknown, 2, "nonsense");
    expect_end(&f, stray, 2, "stray");
    process_folder_remove(f.folder);
}

/* Goal: ODSI_CPU names instruction sets, although a flag is called --cpu. Method: with a
 * mask set the worker starts, and stops when told to, instead of refusing a flag's value. */
Test(worker, takes_the_mask_of_instruction_sets_from_the_environment, .timeout = 60)
{
    struct fixture f;
    struct process *worker = NULL;
    int code = -1;
    char *log = NULL;
    set_up(&f);
    const char *const args[] = {f.state, "--threads=1", "--model",     MODEL, "--coordinator",
                                NOBODY,  "--listen",    "127.0.0.1:0", NULL};
    const char *const env[] = {"ODSI_CPU=scalar", NULL};
    const struct process_config config = {
        .program = "odsi-worker", .args = args, .env = env, .folder = f.folder, .name = "masked"};
    cr_assert_eq(process_start(&worker, &config), ODSI_OK);
    usleep(500000);
    process_signal(worker, SIGTERM);
    cr_expect_eq(process_wait(worker, 3000000u, &code), ODSI_OK);
    cr_assert_eq(process_read_log(&log, worker), ODSI_OK);
    cr_expect_eq(code, 0, "%d: %s", code, log);
    alloc_free(log);
    process_close(&worker);
    process_folder_remove(f.folder);
}

Test(worker, refuses_models_that_are_not_there_or_not_whole, .timeout = 60)
{
    struct fixture f;
    struct buf buf;
    char cut[PROCESS_PATH_SIZE], text[PROCESS_PATH_SIZE];
    set_up(&f);
    buf_init(&buf, 16u << 20);
    cr_assert_eq(io_read_file(MODEL, &buf), ODSI_OK);
    cr_assert_eq(process_path(cut, f.folder, "cut.gguf"), ODSI_OK);
    cr_assert_eq(process_path(text, f.folder, "text.gguf"), ODSI_OK);
    cr_assert_eq(io_write_file(cut, buf.data, buf.size - 1000, 0600, 0), ODSI_OK);
    cr_assert_eq(io_write_file(text, "once upon a time\n", 17, 0600, 0), ODSI_OK);
    buf_free(&buf);
    const char *const base[] = {"--coordinator", NOBODY, "--listen", "127.0.0.1:0", "--model"};
    const char *const missing[] = {base[0], base[1], base[2], base[3], base[4], "/no/such", NULL};
    const char *const is_cut[] = {base[0], base[1], base[2], base[3], base[4], cut, NULL};
    const char *const is_text[] = {base[0], base[1], base[2], base[3], base[4], text, NULL};
    const char *const layers[] = {base[0], base[1],    base[2], base[3], base[4],
                                  MODEL,   "--layers", "4-6",   NULL};
    expect_end(&f, missing, 1, "/no/such");
    expect_end(&f, is_cut, 1, "cut.gguf");
    expect_end(&f, is_text, 1, "text.gguf");
    expect_end(&f, layers, 1, "layers 0-5");
    process_folder_remove(f.folder);
}

Test(worker, refuses_a_port_in_use_and_a_key_that_others_may_read, .timeout = 60)
{
    struct fixture f;
    char store[PROCESS_PATH_SIZE + 32], ready[PROCESS_PATH_SIZE], address[512], key[600];
    char ready_flag[PROCESS_PATH_SIZE + 32], listen[64], bad_key[PROCESS_PATH_SIZE + 32];
    struct process *coordinator = NULL;
    set_up(&f);
    cr_assert_eq(process_path(ready, f.folder, "c.ready"), ODSI_OK);
    snprintf(store, sizeof store, "--store=sqlite:%s/odsi.db", f.folder);
    snprintf(ready_flag, sizeof ready_flag, "--ready-file=%s", ready);
    snprintf(key, sizeof key, "--identity=%s/c.pem", f.folder);
    const char *const args[] = {"--listen=127.0.0.1:0", store, ready_flag, key, NULL};
    const struct process_config config = {
        .program = "odsi-coordinator", .args = args, .folder = f.folder, .name = "coordinator"};
    cr_assert_eq(process_start(&coordinator, &config), ODSI_OK);
    cr_assert_eq(process_wait_line(coordinator, ready, WAIT_US, address, sizeof address), ODSI_OK);
    snprintf(listen, sizeof listen, "127.0.0.1%s", strrchr(address, ':'));
    const char *const taken[] = {"--model", MODEL, "--coordinator", address, "--listen",
                                 listen,    NULL};
    expect_end(&f, taken, 1, listen);

    cr_assert_eq(process_path(bad_key, f.folder, "open.pem"), ODSI_OK);
    cr_assert_eq(io_write_file(bad_key, "x", 1, 0644, 0), ODSI_OK);
    const char *const readable[] = {"--model", MODEL,      "--coordinator", address, "--identity",
                                    bad_key,   "--listen", "127.0.0.1:0",   NULL};
    expect_end(&f, readable, 1, "open.pem");
    process_close(&coordinator);
    process_folder_remove(f.folder);
}

/* Goal: a coordinator that is not there is no reason to give up: it may come. */
Test(worker, waits_for_a_coordinator_and_stops_when_told_to, .timeout = 60)
{
    struct fixture f;
    int code = -1;
    const char *const args[] = {"--model",     MODEL, "--coordinator", NOBODY, "--listen",
                                "127.0.0.1:0", NULL};
    set_up(&f);
    struct process *process = start(&f, args);
    usleep(700000);
    process_signal(process, SIGTERM);
    cr_expect_eq(process_wait(process, 3000000u, &code), ODSI_OK, "it does not stop");
    cr_expect_eq(code, 0);
    process_close(&process);
    process_folder_remove(f.folder);
}
