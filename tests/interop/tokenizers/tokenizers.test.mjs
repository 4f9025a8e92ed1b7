// The ids that this project gives to texts, against those of Hugging Face's tokenizers (the Rust
// library, as npm package), with the tokenizer.json of real models.
//
// `make interop` runs it; it needs TOKENIZER_IDS, the program made of tests/interop/tokenizer_ids.c.
import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import fs from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";
import { test } from "node:test";
import { texts } from "./texts.mjs";

const require = createRequire(import.meta.url);
const { Tokenizer } = require("@anush008/tokenizers");
const TEXT_COUNT = Number(process.env.TEXT_COUNT ?? 500);
const FAMILIES = ["llama3_1", "qwen2_5", "gemma2", "llama2", "mistral_nemo"];

function folderOf(family) {
  return path.join(import.meta.dirname, `node_modules/@lenml/tokenizer-${family}/models`);
}

function ourIds(folder, all) {
  const output = execFileSync(process.env.TOKENIZER_IDS, [folder], {
    input: JSON.stringify(all),
    maxBuffer: 1 << 28,
  });
  return JSON.parse(output);
}

/** The texts whose ids differ, each with both lists. */
async function differences(reference, all, got) {
  const found = [];
  for (let i = 0; i < all.length; i++) {
    const encoding = await reference.encode(all[i], null, { addSpecialTokens: true });
    const wanted = encoding.getIds();
    if (JSON.stringify(wanted) !== JSON.stringify(got[i]))
      found.push({ text: all[i], wanted, got: got[i] });
  }
  return found;
}

for (const family of FAMILIES)
  test(`${family}: ${TEXT_COUNT} texts have the reference's ids`, async () => {
    const folder = folderOf(family);
    const all = texts(TEXT_COUNT);
    assert.equal(new Set(all).size, all.length);
    const got = ourIds(folder, all);
    assert.equal(got.length, all.length);
    const json = JSON.parse(fs.readFileSync(path.join(folder, "tokenizer.json"), "utf8"));
    // Our texts go to the model as they are. Where the reference would rewrite one to NFC, it is
    // asked without that step; all others it gets with the file as it is.
    if (json.normalizer?.type === "NFC") {
      const isNfc = (text) => text === text.normalize("NFC");
      const whole = Tokenizer.fromString(JSON.stringify(json));
      const kept = all.map((text, i) => [text, got[i]]).filter(([text]) => isNfc(text));
      assert.ok(kept.length > all.length / 2);
      assert.deepEqual(await differences(whole, kept.map(([t]) => t), kept.map(([, g]) => g)), []);
      json.normalizer = null;
    }
    const reference = Tokenizer.fromString(JSON.stringify(json));
    assert.deepEqual(await differences(reference, all, got), []);
  });
