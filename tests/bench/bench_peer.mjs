// Prefill and decode rates of llama.cpp on one GGUF file, as JSON: the peer of bench_peer.py.
//   node bench_peer.mjs MODEL.gguf THREADS PROMPT_TOKENS GEN_TOKENS REPEATS
// Token ids are arbitrary, below the smallest vocabulary of the models it is used with.
import {getLlama} from "node-llama-cpp";

const [path, threads, prompt, gen, repeats] =
  process.argv.slice(2).map((arg, i) => (i === 0 ? arg : Number(arg)));
const llama = await getLlama({gpu: false, build: "never", progressLogs: false, logLevel: "error",
  maxThreads: threads});
const model = await llama.loadModel({modelPath: path});
const context = await model.createContext({contextSize: prompt + gen + 64, batchSize: 512, threads});
const sequence = context.getSequence();
const tokens = Array.from({length: prompt}, (_, i) => 300 + ((i * 7919) % 1500));
const rates = [];
for (let round = 0; round < repeats; round++) {
  await sequence.clearHistory();
  const start = performance.now();
  await sequence.evaluateWithoutGeneratingNewTokens(tokens);
  const filled = performance.now();
  let count = 0;
  for await (const token of sequence.evaluate([500], {temperature: 0, yieldEogToken: true}))
    if (++count >= gen) break;
  const done = performance.now();
  rates.push({prefill_tps: prompt / (filled - start) * 1000, decode_tps: gen / (done - filled) * 1000});
}
console.log(JSON.stringify({engine: "llama.cpp", release: llama.llamaCppRelease?.release, rates}));
process.exit(0);
