#!/usr/bin/env python3
"""Our engine beside llama.cpp on the same files, in one run.

    tests/bench/bench_peer.py --model FILE [--model FILE ...] [--threads 2] [--prompt-tokens 128]
                              [--gen-tokens 32] [--rounds 3] [--build build/release] [--json]

llama.cpp is the prebuilt one of the npm package node-llama-cpp, installed into build/peer when it
is not there. Every round runs ours, then theirs, each in a process of its own with three repeats of
which the best counts; the medians over the rounds are printed, and what each engine read from
memory while it decoded beside what a plain loop of the same threads reads (copy_gbps). Models:

    odsi model synth m.gguf --shape llama-1.1b --type q8_0
"""
import argparse
import json
import os
import statistics
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
PEER_VERSION = "3"


def run_json(command, **options):
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False, **options)
    if done.returncode != 0:
        sys.exit(f"bench_peer: {' '.join(command)} ended with {done.returncode}")
    return json.loads(done.stdout.decode().strip().split("\n")[-1] if "node" in command[0]
                      else done.stdout)


def install_peer(folder):
    if not os.path.isdir(os.path.join(folder, "node_modules", "node-llama-cpp")):
        os.makedirs(folder, exist_ok=True)
        subprocess.run(["npm", "install", f"node-llama-cpp@{PEER_VERSION}", "--ignore-scripts",
                        "--no-audit", "--no-fund", "--loglevel=error", "--prefix", folder],
                       check=True, stdout=subprocess.DEVNULL)
    script = os.path.join(folder, "bench_peer.mjs")
    with open(os.path.join(HERE, "bench_peer.mjs"), encoding="utf-8") as source:
        text = source.read()
    with open(script, "w", encoding="utf-8") as target:
        target.write(text)
    return os.path.abspath(script)


def ours(options, model):
    runs = [run_json([os.path.join(options.build, "bin", "odsi"), "bench", "--model", model,
                      "--json", "--threads", str(options.threads),
                      "--prompt-tokens", str(options.prompt_tokens),
                      "--gen-tokens", str(options.gen_tokens)]) for _ in range(3)]
    best = max(runs, key=lambda run: run["decode_tps"])
    return {"prefill_tps": max(run["prefill_tps"] for run in runs),
            "decode_tps": best["decode_tps"],
            "read_gbps": best["read_gbps"], "copy_gbps": best["copy_gbps"],
            "read_ratio": max(run["read_gbps"] / run["copy_gbps"] for run in runs)}


def theirs(options, script, model):
    result = run_json(["node", script, os.path.abspath(model), str(options.threads),
                       str(options.prompt_tokens), str(options.gen_tokens), "3"],
                      cwd=os.path.dirname(script))
    return {name: max(rate[name] for rate in result["rates"])
            for name in ("prefill_tps", "decode_tps")}


def medians(rounds):
    return {name: statistics.median(values[name] for values in rounds) for name in rounds[0]}


def measure(options, script, model):
    rounds = [(ours(options, model), theirs(options, script, model))
              for _ in range(options.rounds)]
    mine, peer = medians([r[0] for r in rounds]), medians([r[1] for r in rounds])
    ratios = medians([{name: r[0][name] / r[1][name] for name in r[1]} for r in rounds])
    return {"model": os.path.basename(model), "ours": mine, "llama.cpp": peer, "ratio": ratios}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--build", default="build/release")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--gen-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", default="build/peer", help="where npm installs")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    script = install_peer(options.peer)
    results = [measure(options, script, model) for model in options.model]
    if options.json:
        print(json.dumps(results, indent=1))
        return
    print(f"{options.threads} threads, prompt {options.prompt_tokens}, generate "
          f"{options.gen_tokens}; tokens/s, medians of {options.rounds} rounds")
    for result in results:
        mine, peer, ratio = result["ours"], result["llama.cpp"], result["ratio"]
        print(f"{result['model']}\n"
              f"  prefill  ours {mine['prefill_tps']:8.1f}  llama.cpp {peer['prefill_tps']:8.1f}"
              f"  ratio {ratio['prefill_tps']:.2f}\n"
              f"  decode   ours {mine['decode_tps']:8.1f}  llama.cpp {peer['decode_tps']:8.1f}"
              f"  ratio {ratio['decode_tps']:.2f}   reads {mine['read_gbps']:.1f} GB/s, a plain "
              f"loop {mine['copy_gbps']:.1f} (best {mine['read_ratio']:.2f})")


if __name__ == "__main__":
    main()
