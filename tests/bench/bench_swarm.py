#!/usr/bin/env python3
"""What a swarm costs over one process, and a hop over a bare gRPC ping-pong, on this machine.

    tests/bench/bench_swarm.py [--build build/release] [--model FILE] [--workers 3] [--threads 1]
                               [--prompt-tokens 16] [--gen-tokens 128] [--rounds 5] [--json]

Every round measures, one after the other: decoding in one process (odsi bench), decoding through a
local swarm over mutual TLS (odsi generate), and a ping-pong of one frame of the model's size
between two processes with bare gRPC C-core over mutual TLS (bench_rpc): once back to back, when
everything stays in the caches, and once with as much memory read before each message as a stage
reads. Only ratios within the run mean anything; the medians over the rounds are printed.

A token passes `workers` hops (the ring included). The time of a hop is what is left of a token when
the computing of all stages is taken away, over the number of hops: wire, wake-ups, queue, framing,
and everything that gateway and client do to the processors meanwhile.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys


def run_json(command, env=None):
    """The JSON object that command prints; its errors end the benchmark."""
    done = subprocess.run(command, stdout=subprocess.PIPE, env=env, check=False)
    if done.returncode != 0:
        sys.exit(f"bench_swarm: {' '.join(command)} ended with {done.returncode}")
    return json.loads(done.stdout)


def one_process(options):
    result = run_json([options.odsi, "bench", "--model", options.model, "--json",
                       "--threads", str(options.threads),
                       "--prompt-tokens", str(options.prompt_tokens),
                       "--gen-tokens", str(options.gen_tokens)])
    return {"decode_tps": result["decode_tps"], "read_gbps": result["read_gbps"]}


def swarm(options):
    """Two answers; the first one opens the connections, the second one counts."""
    generate = [options.odsi, "generate", "--prompt", "a " * (options.prompt_tokens // 2),
                "--max-tokens", str(options.gen_tokens), "--ignore-end", "--json"]
    script = " ".join(f"'{word}'" for word in generate)
    answer = run_json([options.odsi, "local", "--quiet", "--workers", str(options.workers),
                       "--threads", str(options.threads), "--model", options.model, "--",
                       "sh", "-c", f"{script} >/dev/null && {script}"])
    token_us = 1e6 / answer["timings"]["tokens_per_s"]
    compute_us = sum(hop["compute_us"] for hop in answer["hops"])
    return {"decode_tps": answer["timings"]["tokens_per_s"], "token_us": token_us,
            "compute_us": compute_us, "hop_us": (token_us - compute_us) / options.workers}


def ping_pong(options, frame_size, work_us):
    """One way of the bare ping-pong; work_us of reading memory stand before each message."""
    result = run_json([options.bench_rpc, "--json", "--sizes", str(frame_size), "--repeat", "1",
                       "--rounds", "200" if work_us > 1000 else "2000",
                       "--work-us", str(work_us)])
    mtls = [line for line in result["round_trips"] if line["security"] == "mtls"][0]
    return {"one_way_us": mtls["bare_p50_us"] / 2}


def frame_size_of(options):
    """Bytes of one position's residual stream: dim binary32 numbers."""
    result = run_json([options.odsi, "model", "inspect", options.model, "--json"])
    return 4 * result["dim"]


def medians(rounds):
    return {name: statistics.median(values[name] for values in rounds) for name in rounds[0]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--build", default="build/release")
    parser.add_argument("--model", default="deploy/demo/odsi-tiny-q8_0.gguf")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--gen-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.odsi = os.path.join(options.build, "bin", "odsi")
    options.bench_rpc = os.path.join(options.build, "bench", "bench_rpc")
    frame_size = frame_size_of(options)
    alone, together, bare, after_work = [], [], [], []
    for _ in range(options.rounds):
        alone.append(one_process(options))
        together.append(swarm(options))
        stage_us = int(together[-1]["compute_us"] / options.workers)
        bare.append(ping_pong(options, frame_size, 0))
        after_work.append(ping_pong(options, frame_size, stage_us))
    result = {
        "model": os.path.basename(options.model), "workers": options.workers,
        "threads": options.threads, "rounds": options.rounds, "frame_size": frame_size,
        "one_process": medians(alone), "swarm": medians(together), "ping_pong": medians(bare),
        "ping_pong_after_work": medians(after_work),
        "swarm_over_one_process": statistics.median(
            b["decode_tps"] / a["decode_tps"] for a, b in zip(alone, together)),
        "hop_over_ping_pong": statistics.median(
            b["hop_us"] / c["one_way_us"] for b, c in zip(together, bare)),
        "hop_over_ping_pong_after_work": statistics.median(
            b["hop_us"] / c["one_way_us"] for b, c in zip(together, after_work)),
    }
    if options.json:
        print(json.dumps(result))
        return
    print(f"{result['model']}, {options.workers} workers, {options.threads} threads each, "
          f"medians of {options.rounds} rounds")
    print(f"  one process      {result['one_process']['decode_tps']:10.1f} tokens/s")
    print(f"  swarm            {result['swarm']['decode_tps']:10.1f} tokens/s"
          f"   ratio {result['swarm_over_one_process']:.3f}")
    print(f"  a hop            {result['swarm']['hop_us']:10.1f} us, {frame_size} bytes")
    for name, label in (("ping_pong", "back to back"), ("ping_pong_after_work", "after work")):
        print(f"  bare ping-pong   {result[name]['one_way_us']:10.1f} us one way, {label:12s}"
              f"   ratio of a hop {result['hop_over_' + name]:.2f}")


if __name__ == "__main__":
    main()
