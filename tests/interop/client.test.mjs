// A client that nobody of this project wrote, against a gateway: @grpc/grpc-js for the calls, its
// proto-loader for proto/, and grpc-reflection-js for a client without any .proto file.
//
// `make interop` runs it inside a local swarm; it needs ODSI_GATEWAY (host:port, plaintext) and
// ODSI_PROTO (the folder proto/).
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";
import reflection from "grpc-reflection-js";

const gateway = process.env.ODSI_GATEWAY;
const protoFolder = process.env.ODSI_PROTO;
const PROMPT = "Once upon a time";
const TOKENS = 40;
const DEADLINE_MS = 30000;

let inference;

function deadline() {
  return { deadline: Date.now() + DEADLINE_MS };
}

before(() => {
  assert.ok(gateway && protoFolder, "run this by `make interop`");
  const definition = protoLoader.loadSync("odsi/v1/inference.proto", {
    includeDirs: [protoFolder],
    keepCase: true,
    longs: String,
    enums: String,
    defaults: true,
  });
  const { odsi } = grpc.loadPackageDefinition(definition);
  inference = new odsi.v1.Inference(gateway, grpc.credentials.createInsecure());
});

after(() => inference.close());

/** All messages of one answer. */
function generate(request) {
  return new Promise((resolve, reject) => {
    const messages = [];
    const call = inference.Generate(request, deadline());
    call.on("data", (message) => messages.push(message));
    call.on("end", () => resolve(messages));
    call.on("error", reject);
  });
}

function textOf(messages) {
  return messages.map((message) => message.text).join("");
}

test("reflection lists the services", async () => {
  const client = new reflection.Client(gateway, grpc.credentials.createInsecure());
  const services = await client.listServices();
  client.grpcClient.close();
  for (const name of ["odsi.v1.Inference", "grpc.health.v1.Health"])
    assert.ok(services.includes(name), `${name} is not among ${services}`);
});

test("ListModels names a model that is served whole", async () => {
  const reply = await new Promise((resolve, reject) =>
    inference.ListModels({}, deadline(), (error, value) =>
      error ? reject(error) : resolve(value),
    ),
  );
  assert.equal(reply.models.length, 1);
  const [model] = reply.models;
  assert.equal(model.name, "odsi-tiny");
  assert.equal(model.complete, true);
  assert.equal(model.model_id.length, 32);
  assert.equal(model.layer_count, 6);
});

test("Generate streams a story token by token, twice the same", async () => {
  const request = { prompt: PROMPT, max_tokens: TOKENS, ignore_end: true };
  const first = await generate(request);
  const second = await generate(request);
  const tokens = first.flatMap((message) => message.tokens);
  assert.equal(tokens.length, TOKENS);
  assert.ok(first.length > TOKENS / 2, `${first.length} messages are not a stream`);
  assert.match(textOf(first), /[A-Za-z]{3}/);
  assert.equal(textOf(first), textOf(second));
  assert.deepEqual(tokens, second.flatMap((message) => message.tokens));
  const { summary } = first.at(-1);
  assert.equal(summary.finish, "FINISH_LENGTH");
  assert.equal(summary.new_token_count, TOKENS);
  assert.equal(summary.hops.length, 2);
  assert.deepEqual(
    summary.hops.map((hop) => [hop.stage.layers.first, hop.stage.layers.end]),
    [[0, 3], [3, 6]],
  );
});

test("a seed repeats a sampled story, another seed tells another one", async () => {
  const request = { prompt: PROMPT, max_tokens: TOKENS, temperature: 1, ignore_end: true };
  const [one, same, other] = await Promise.all(
    ["7", "7", "8"].map((seed) => generate({ ...request, seed })),
  );
  assert.equal(textOf(one), textOf(same));
  assert.notEqual(textOf(one), textOf(other));
  assert.equal(one.at(-1).summary.seed, "7");
});

// What a tool such as grpcurl does: no .proto file, only what the server says about itself.
test("a client made from reflection alone can generate", async () => {
  const client = new reflection.Client(gateway, grpc.credentials.createInsecure());
  const root = await client.fileContainingSymbol("odsi.v1.Inference");
  client.grpcClient.close();
  const method = root.lookupService("odsi.v1.Inference").methods.Generate;
  assert.equal(method.responseStream, true);
  const Request = root.lookupType("odsi.v1.GenerateRequest");
  const Response = root.lookupType("odsi.v1.GenerateResponse");
  const channel = new grpc.Client(gateway, grpc.credentials.createInsecure());
  const text = await new Promise((resolve, reject) => {
    let out = "";
    const call = channel.makeServerStreamRequest(
      "/odsi.v1.Inference/Generate",
      (value) => Buffer.from(Request.encode(value).finish()),
      (bytes) => Response.decode(bytes),
      Request.fromObject({ prompt: PROMPT, max_tokens: TOKENS, ignore_end: true }),
      deadline(),
    );
    call.on("data", (message) => (out += message.text));
    call.on("end", () => resolve(out));
    call.on("error", reject);
  });
  channel.close();
  const same = await generate({ prompt: PROMPT, max_tokens: TOKENS, ignore_end: true });
  assert.equal(text, textOf(same));
});

test("mistakes get the status that fits", async () => {
  const { INVALID_ARGUMENT, NOT_FOUND, UNIMPLEMENTED } = grpc.status;
  await assert.rejects(generate({ prompt: PROMPT, temperature: -1 }), { code: INVALID_ARGUMENT });
  await assert.rejects(generate({ prompt: PROMPT, model: "no-such-model" }), { code: NOT_FOUND });
  const channel = new grpc.Client(gateway, grpc.credentials.createInsecure());
  const call = (path, body) =>
    new Promise((resolve, reject) =>
      channel.makeUnaryRequest(path, (x) => x, (x) => x, body, deadline(), (error, value) =>
        error ? reject(error) : resolve(value),
      ),
    );
  const garbage = Buffer.from([0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f]);
  const nothing = call("/odsi.v1.Inference/Nothing", Buffer.alloc(0));
  await assert.rejects(nothing, { code: UNIMPLEMENTED });
  for (const method of ["Generate", "ListModels"])
    await assert.rejects(call(`/odsi.v1.Inference/${method}`, garbage), { code: INVALID_ARGUMENT });
  channel.close();
});

test("cancelling a stream ends it, and the gateway goes on serving", async () => {
  const error = await new Promise((resolve) => {
    const call = inference.Generate(
      { prompt: PROMPT, max_tokens: 400, temperature: 1, seed: "3", ignore_end: true },
      deadline(),
    );
    call.once("data", () => call.cancel());
    call.on("data", () => {});
    call.on("error", resolve);
    call.on("end", () => resolve({ code: "ended" }));
  });
  assert.equal(error.code, grpc.status.CANCELLED);
  const next = await generate({ prompt: PROMPT, max_tokens: 3, ignore_end: true });
  assert.equal(next.at(-1).summary.new_token_count, 3);
});
