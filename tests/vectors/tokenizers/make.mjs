// Makes the files beside it: two small vocabularies, and the ids that Hugging Face's tokenizers
// (the Rust library, npm package @anush008/tokenizers 0.6.0) give to some texts with them, under the
// pipelines of several model families.
//
//   npm install @anush008/tokenizers@0.6.0 && node make.mjs
//
// The vocabularies are trained here on the text below, by the plain algorithm: the most frequent
// pair joins, again and again.
import fs from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";

const require = createRequire(path.join(process.cwd(), "/"));
const { Tokenizer } = require("@anush008/tokenizers");
const HERE = import.meta.dirname;
const MERGE_COUNT = 260;
const CORPUS = `Once upon a time there was a small machine that read every book in the town. It didn't
know who wrote them, and it couldn't ask; they'd all gone home. "We'll see," said the fox, "I'm
sure you've been here before, and he's the one who'd know." The machine thought about the other
machines, thousands of them, each with a layer of the same mind. for (int i = 0; i < 10; i++) {
    total += weights[i] * inputs[i];  // 1234 567 89
}
def answer(question):
    return question.strip()   # nothing else to do here
Zoë wäre früh über die Straße gegangen; où est le café? Ça dépend où l'été est passé. 你好，世界。你好！
мир, труд, май и мир. مرحبا يا عالم. 日本の日本語。 THE HTTP Server AND THE TCP Client. 12 345 678 2026-11-23\n\n\n
😀😀 👍🏽 👍🏽 ... --- === !!! ??? <<>> ((())) [[]] {{}}   \t\t  \n\n`.repeat(3);

const TEXTS = [
  "", " ", "  ", "\n", "\n\n", "\n\n\n", " \n", "\n ", "\t\tx", "a", " a", "a ", "  a", "   a  b   c",
  "Once upon a time", "once upon a time there was", " The machine thought", "THE HTTPServer and TCPClient",
  "it's I'M we'LL they'd don't 's 'S 'x '' l'été", "couldn't've", "x'd'll", "1", "12", "123", "1234",
  "1234567", "a1b22c333", "v1.2.3-rc4 2026-11-23", "٣٤٥ ١٢", "½ Ⅷ ²",
  "for (int i = 0; i < 10; i++) {\n    total += 1;\n}\n", "def f(x):\n\treturn x\r\n\r\n  # done   ",
  "a  \n  b", "a \n\n b", "...!!!???", "--- === ---", "((()))[]{}<>", "a/b\\c", "foo/\nbar//\n",
  "https://example.com/a?b=c&d=1", "Zoë wäre früh", "Ça dépend où l'été", "e\u0301 a\u0308", "ÄÖÜß ŒÆ",
  "你好，世界", "日本語の世界", "мир и ТРУД", "مرحبا يا", "שלום", "ไทย हिन्दी தமிழ்", "ǅ ǆ Ǆ ʰʱ ªº",
  "😀 👍🏽 👩‍👩‍👧 🇩🇪", "❤️ 1️⃣", "\u00a0x\u2003y\u3000z", "\u0085a\u2028b\u200bc", "\u180e x",
  "\ufeffbom", "\u0000\u0001\u007f", "\u{10ffff}\u{e000}", "unreachable unreachable", "aaaaaaaaaaaaaaaa",
  "machinemachinesmachin", "<s>", "</s>x", "<|end|>  x", "a <|end|> b", "<|en|end|>", "<|end|><|end|>",
  "[X]", "a[X]b [X] c", "[X][X] \n[X", "<0x41><unk>", "tail ",
];

/** GPT-2's alphabet: each byte as a printable character. */
function byteAlphabet() {
  const letters = [];
  let spare = 0x100;
  for (let byte = 0; byte < 256; byte++) {
    const printable =
      (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
    letters.push(String.fromCodePoint(printable ? byte : spare++));
  }
  return letters;
}

/** Joins the most frequent pair of the words, count times. Returns the merges. */
function train(words, count) {
  const merges = [];
  while (merges.length < count) {
    const seen = new Map();
    for (const word of words)
      for (let i = 0; i + 1 < word.length; i++) {
        const pair = `${word[i]} ${word[i + 1]}`;
        seen.set(pair, (seen.get(pair) ?? 0) + 1);
      }
    const [best] = [...seen].sort((a, b) => b[1] - a[1] || (a[0] < b[0] ? -1 : 1))[0];
    const [left, right] = best.split(" ");
    merges.push([left, right]);
    for (const word of words)
      for (let i = 0; i + 1 < word.length; i++)
        if (word[i] === left && word[i + 1] === right) word.splice(i, 2, left + right);
  }
  return merges;
}

function added(id, content, special, more = {}) {
  return { id, content, single_word: false, lstrip: false, rstrip: false, normalized: false, special,
    ...more };
}

function bytesBase() {
  const alphabet = byteAlphabet();
  const words = CORPUS.match(/'[a-z]+| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu).map((word) =>
    [...Buffer.from(word)].map((byte) => alphabet[byte]));
  const merges = train(words, MERGE_COUNT);
  const pieces = [...alphabet, ...merges.map(([left, right]) => left + right), "Ġunreachable"];
  const vocab = Object.fromEntries([...new Set(pieces)].map((piece, id) => [piece, id]));
  const next = Object.keys(vocab).length;
  return {
    version: "1.0",
    added_tokens: [added(next, "<s>", true), added(next + 1, "</s>", true),
      added(next + 2, "<|end|>", true, { rstrip: true }), added(next + 3, "[X]", false)],
    normalizer: null, pre_tokenizer: null, post_processor: null,
    decoder: { type: "ByteLevel", add_prefix_space: true, trim_offsets: true, use_regex: true },
    model: { type: "BPE", dropout: null, unk_token: null, continuing_subword_prefix: null,
      end_of_word_suffix: null, fuse_unk: false, byte_fallback: false, ignore_merges: false, vocab,
      merges: merges.map((pair) => pair.join(" ")) },
  };
}

function spmBase() {
  const words = CORPUS.replaceAll(" ", "▁").match(/▁*[^▁]+/gu).map((word) => [...word]);
  const common = new Set(words.flat().filter((letter) => letter < "\u0250" || letter === "▁"));
  for (const word of words)
    for (let i = 0; i < word.length; i++) if (!common.has(word[i])) word.splice(i);
  const merges = train(words, MERGE_COUNT);
  const bytes = Array.from({ length: 256 }, (_, byte) =>
    `<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`);
  const pieces = ["<unk>", "<s>", "</s>", ...bytes, ...merges.map(([left, right]) => left + right),
    ...common];
  const vocab = Object.fromEntries([...new Set(pieces)].map((piece, id) => [piece, id]));
  const next = Object.keys(vocab).length;
  return {
    version: "1.0",
    added_tokens: [added(0, "<unk>", true), added(1, "<s>", true), added(2, "</s>", true),
      added(next, "<|end|>", true, { rstrip: true }), added(next + 1, "[X]", false)],
    normalizer: null, pre_tokenizer: null, post_processor: null,
    decoder: { type: "Fuse" },
    model: { type: "BPE", dropout: null, unk_token: "<unk>", continuing_subword_prefix: null,
      end_of_word_suffix: null, fuse_unk: true, byte_fallback: true, ignore_merges: false, vocab,
      merges },
  };
}

function isolated(pattern) {
  return { type: "Sequence", pretokenizers: [
    { type: "Split", pattern: { Regex: pattern }, behavior: "Isolated", invert: false },
    { type: "ByteLevel", add_prefix_space: false, trim_offsets: true, use_regex: false }] };
}

function withBos(base) {
  const id = base.added_tokens.find((token) => token.content === "<s>").id;
  return { type: "TemplateProcessing",
    single: [{ SpecialToken: { id: "<s>", type_id: 0 } }, { Sequence: { id: "A", type_id: 0 } }],
    pair: [{ Sequence: { id: "A", type_id: 0 } }, { Sequence: { id: "B", type_id: 1 } }],
    special_tokens: { "<s>": { id: "<s>", ids: [id], tokens: ["<s>"] } } };
}

const WORDS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+";
const REST = " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
const CAPITALS = "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]";
const SMALLS = "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]";
const ONE = "[^\\r\\n\\p{L}\\p{N}]?";
const TEKKEN = `${ONE}${CAPITALS}*${SMALLS}+|${ONE}${CAPITALS}+${SMALLS}*|\\p{N}|` +
  REST.replace("[\\r\\n]*", "[\\r\\n/]*");
const byteLevel = { type: "ByteLevel", add_prefix_space: false, trim_offsets: true, use_regex: true };
const toMarks = { type: "Replace", pattern: { String: " " }, content: "▁" };

const bytes = bytesBase();
const spm = spmBase();
const pipelines = [
  { name: "llama3", base: "bytes", ignore_merges: true,
    change: { pre_tokenizer: isolated(`${WORDS}|\\p{N}{1,3}|${REST}`),
      post_processor: { type: "Sequence", processors: [byteLevel, withBos(bytes)] } } },
  { name: "qwen2", base: "bytes", change: { pre_tokenizer: isolated(`${WORDS}|\\p{N}|${REST}`) } },
  { name: "smollm", base: "bytes", change: { pre_tokenizer: { type: "Sequence",
    pretokenizers: [{ type: "Digits", individual_digits: true }, byteLevel] } } },
  { name: "gpt-2", base: "bytes", change: { pre_tokenizer: byteLevel } },
  { name: "tekken", base: "bytes", ignore_merges: true, change: { pre_tokenizer: isolated(TEKKEN) } },
  { name: "llama2", base: "spm", change: { post_processor: withBos(spm),
    normalizer: { type: "Sequence", normalizers: [{ type: "Prepend", prepend: "▁" }, toMarks] } } },
  { name: "gemma", base: "spm", change: { post_processor: withBos(spm), normalizer: toMarks,
    pre_tokenizer: { type: "Split", pattern: { String: " " }, behavior: "MergedWithPrevious",
      invert: false } } },
  // Metaspace puts no space in front of one, and we do: such texts are left out.
  { name: "mistral", base: "spm", skips_leading_space: true, change: { post_processor: withBos(spm),
    pre_tokenizer: { type: "Metaspace", replacement: "▁", prepend_scheme: "first", split: false } } },
];

for (const pipeline of pipelines) {
  const json = { ...(pipeline.base === "bytes" ? bytes : spm), ...pipeline.change };
  json.model = { ...json.model, ignore_merges: pipeline.ignore_merges ?? false };
  const reference = Tokenizer.fromString(JSON.stringify(json));
  pipeline.ids = [];
  for (const text of TEXTS)
    pipeline.ids.push((await reference.encode(text, null, { addSpecialTokens: true })).getIds());
}

fs.writeFileSync(path.join(HERE, "bytes.json"), `${JSON.stringify(bytes)}\n`);
fs.writeFileSync(path.join(HERE, "spm.json"), `${JSON.stringify(spm)}\n`);
const lines = pipelines.map((pipeline) => JSON.stringify(pipeline)).join(",\n");
fs.writeFileSync(path.join(HERE, "cases.json"),
  `{"texts":${JSON.stringify(TEXTS)},\n"pipelines":[\n${lines}\n]}\n`);
