// Texts that tokenizers disagree about, the same ones at every run.

const WORDS = ["Once", "upon", "a", "time", "the", "of", "internationalization", "don't", "We'LL",
  "it's", "I'VE", "they're", "O'Neill", "naïve", "façade", "Ünïcödé", "straße", "İstanbul", "ﬁne",
  "x_y", "snake_case_name", "camelCaseName", "HTTPServer2", "e-mail", "C++", "F#", "§12", "№5",
  "日本語", "中文字符", "你好，世界", "한국어", "안녕하세요", "ไทย", "ภาษาไทย", "हिन्दी", "தமிழ்", "বাংলা",
  "العربية", "مرحبا", "שלום", "עברית", "Ελληνικά", "Русский", "Українська", "ქართული", "Հայերեն",
  "አማርኛ", "ᏣᎳᎩ", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "ｆｕｌｌｗｉｄｔｈ", "①②③", "½¾", "²³", "Ⅷ", "١٢٣", "१२३", "𝟘𝟙𝟚"];
const EMOJI = ["😀", "👍🏽", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "🇺🇸🇫🇷", "❤️", "☃", "🤷🏾‍♀️", "🦊", "🧑‍🚀", "1️⃣"];
const MARKS = [".", ",", "!", "?", ";", ":", "...", "…", "—", "–", "-", "--", "(", ")", "[", "]", "{",
  "}", "<", ">", "\"", "'", "`", "``", "“", "”", "«", "»", "/", "\\", "|", "&", "*", "**", "#", "##",
  "@", "$", "%", "^", "~", "+", "=", "==", "!=", "=>", "->", "€", "£", "¥", "°", "、", "。", "「", "」"];
const SPACES = [" ", "  ", "   ", "    ", "\n", "\n\n", "\n\n\n", "\r\n", "\r\n\r\n", "\t", "\t\t",
  " \n", "\n ", " \n \n", "\t \t", "\u00a0", "\u2003", "\u3000", "\u200b", "\v", "\f", "\u2028"];
const CODE = ["def f(x):\n    return x**2\n", "for (int i = 0; i < n; i++) {\n\tsum += a[i];\n}\n",
  "SELECT * FROM t WHERE id='5';", "<div class=\"a\">text</div>", "{\"key\": [1, 2.5, null]}",
  "#!/bin/bash\nset -euo pipefail\n", "x = {'a': 1, 'b': 0x1F}", "// comment\r\n/* more */",
  "https://example.com/path?q=1&r=%20#frag", "user.name+tag@example.co.uk", "C:\\Users\\me\\file.txt",
  "fn main() -> Result<(), Box<dyn Error>> {}", "$$\\int_0^1 x^2\\,dx$$", "a->b::c<d>&&e||!f"];
const LOOKALIKES = ["<|im_start|", "<|endoftext", "|>", "<s", "</s >", "< s>", "[INST", "<|eot_id |>",
  "<bos", "<start_of_tur", "<0x41>", "<unk", "[PAD]", "<|>", "<||>"];
/** Written out, these are special tokens of some of the models, and text for the others. */
const SPECIALS = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>",
  "<|begin_of_text|>", "<|start_header_id|>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>",
  "<pad>", "[INST]", "[/INST]", "<think>", "</tool_call>", "<unused7>", "<h1>", "<table>"];
const COMBINING = ["e\u0301", "a\u0308\u0304", "n\u0303o", "Z\u0351\u0346a\u0334l\u0337g\u0336o", "가", "각", "ÅΩK"];

/** Random numbers below n: xorshift, from a seed. */
function randomFrom(seed) {
  let state = seed >>> 0;
  return (n) => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    state >>>= 0;
    return state % n;
  };
}

const fixed = [
  "", " ", "  ", "\n", "a", " a", "a ", "  a  ", "\n\n\n\na", "a\n \n b", "Hello, world!",
  " ".repeat(3) + "x", " ".repeat(15), " ".repeat(16) + "y", " ".repeat(31), "\n".repeat(31),
  "\n".repeat(40), "\t".repeat(9) + "z", "\r\n".repeat(7), " \n".repeat(6), "a" + " ".repeat(20) + "b",
  "1", "12", "123", "1234", "12345678901234567890", "3.14159", "1,234,567.89", "2026-11-23T16:00:18Z",
  "0xDEADBEEF", "1e-5", "١٢٣٤٥٦", "v1.2.3-rc4", "'s 'S 'RE 'm'll'd''", "I'm we'll they'd you've", "'",
  "''''", "x".repeat(300), "ab".repeat(500), "é".repeat(200), "好".repeat(150), "😀".repeat(60),
  "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
  "Llanfairpwllgwyngyllgogerychwyrndrobwllllantysiliogogogoch", "ACGT".repeat(100), "🏳️‍🌈".repeat(9),
  "=".repeat(80), "-".repeat(33), "_".repeat(17), "!?".repeat(21), ".".repeat(100), "#".repeat(7) + " x",
  "\ufeffbom", "a\u0000b", "\u0001\u0002\u007f", "\u0080\u009f\u00ad", "\ue000\uf8ff", "\u{10ffff}",
  "\u200d\u200c\u200e", "ａ　ｂ", "\u1680x\u180ey\u202fz", "\u0085next", "tail \u2028 line\u2029",
  "The quick brown fox jumps over the lazy dog. ".repeat(10),
  ...CODE, ...COMBINING, ...EMOJI, ...LOOKALIKES, ...SPECIALS, ...SPECIALS.map((s) => `x ${s} y`),
  ...SPECIALS.map((s) => `${s}${s}\n${s}z`),
];

/**
 * count different texts; the first ones are chosen, the rest put together at random. None has
 * U+2581, which is a space to the reference, and the character that it is to us.
 */
export function texts(count) {
  const random = randomFrom(20261123);
  const pools = [WORDS, WORDS, WORDS, SPACES, [" "], [" "], MARKS, EMOJI, CODE, LOOKALIKES, SPECIALS,
    COMBINING];
  const all = new Set(fixed);
  while (all.size < count) {
    let text = "";
    for (let parts = 1 + random(24); parts > 0; parts--) {
      const pool = pools[random(pools.length)];
      text += random(20) === 0 ? String.fromCodePoint(33 + random(0x2fff)) : pool[random(pool.length)];
      if (random(12) === 0) text += String(random(2 ** 31));
    }
    all.add(text.replaceAll("\u2581", "_"));
  }
  return [...all].slice(0, count);
}
