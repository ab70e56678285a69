// OpenAI's client for Node: models, chat, streaming, responses, errors. Arguments: URL and model.
const assert = require("node:assert");
const { OpenAI, NotFoundError } = require("openai");

const [url, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused", maxRetries: 0 });
const messages = [{ role: "user", content: "What is the capital of France? Answer in one short sentence." }];
const options = { model, messages, temperature: 0, max_completion_tokens: 24 };

async function main() {
  const names = [];
  for await (const { id } of client.models.list()) names.push(id);
  assert.deepStrictEqual(names, [model]);

  const answer = await client.chat.completions.create(options);
  const text = answer.choices[0].message.content;
  assert.match(text, /Paris/);
  assert.strictEqual(answer.choices[0].finish_reason, "stop");
  assert.match(answer._request_id, /^req_/);

  let streamed = "";
  let usage = null;
  const stream = await client.chat.completions.create({ ...options, stream: true, stream_options: { include_usage: true } });
  for await (const chunk of stream) {
    streamed += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.strictEqual(streamed, text);
  assert.strictEqual(usage.completion_tokens, answer.usage.completion_tokens);

  const final = await client.chat.completions.stream({ ...options, n: 2 }).finalChatCompletion();
  assert.deepStrictEqual(final.choices.map((choice) => choice.message.content), [text, text]);

  const response = await client.responses.create({ model, input: messages, temperature: 0, max_output_tokens: 24 });
  assert.strictEqual(response.output_text, text);
  const events = [];
  for await (const event of await client.responses.create({ model, input: messages, temperature: 0, stream: true })) {
    events.push(event.type);
  }
  assert.strictEqual(events[0], "response.created");
  assert.strictEqual(events.at(-1), "response.completed");

  await assert.rejects(client.chat.completions.create({ ...options, model: "other" }), (error) => {
    assert.ok(error instanceof NotFoundError);
    assert.strictEqual(error.code, "model_not_found");
    return true;
  });
}

main();
