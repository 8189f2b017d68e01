// Requests to the server of this page. All functions throw Problem, or AbortError if the signal asks for it.

export const ALTERNATIVES = 5

export class Problem extends Error {}

// The answer to a request, as JSON.
export async function post(path, body, signal) {
  const response = await sent(path, body, signal)
  return response.json().catch(broken)
}

// The events of a stream: each is JSON after "data: ".
export async function* events(path, body, signal) {
  const response = await sent(path, { ...body, stream: true }, signal)
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader()
  let text = ""
  for (;;) {
    const { value, done } = await reader.read().catch(broken)
    if (done) throw new Problem("The answer broke off.")
    const lines = (text + value).split("\n")
    text = lines.pop()
    for (const line of lines) {
      if (!line.startsWith("data:")) continue
      const data = line.slice(5).trim()
      if (data === "[DONE]") return
      const event = JSON.parse(data)
      if (event.error) throw new Problem(event.error.message)
      yield event
    }
  }
}

async function sent(path, body, signal) {
  const headers = { "Content-Type": "application/json" }
  const response = await fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal }).catch(broken)
  if (response.ok) return response
  const said = await response.json().catch(() => null)
  const message = said?.error?.message ?? `The server answered ${response.status}.`
  const wait = response.headers.get("Retry-After")
  if (response.status === 503) throw new Problem(`Busy: ${message}.${wait ? ` Ask again in ${wait} s.` : ""}`)
  throw new Problem(message)
}

function broken(error) {
  if (error.name === "AbortError") throw error
  throw new Problem("The server does not answer. Is it still running?")
}

// The pieces of an answer: {text, tokens, finish}. tokens: [{text, logprob, top: [{text, logprob}]}]
export async function* continued(model, prompt, settings, signal) {
  const body = { model, prompt, ...settings, logprobs: ALTERNATIVES }
  for await (const { choices: [choice] } of events("/v1/completions", body, signal)) {
    if (!choice) continue
    const { tokens = [], token_logprobs: logprobs, top_logprobs: tops } = choice.logprobs ?? {}
    const top = at => Object.entries(tops?.[at] ?? {}).map(([text, logprob]) => ({ text, logprob }))
    yield {
      text: choice.text, finish: choice.finish_reason,
      tokens: tokens.map((text, at) => ({ text, logprob: logprobs[at], top: sorted(top(at)) })),
    }
  }
}

// As `continued`. messages: [{role, content}]
export async function* chatted(model, messages, settings, signal) {
  const body = { model, messages, ...settings, logprobs: true, top_logprobs: ALTERNATIVES }
  for await (const { choices: [choice] } of events("/v1/chat/completions", body, signal)) {
    if (!choice) continue
    const token = each => ({ text: each.token, logprob: each.logprob })
    const made = each => ({ ...token(each), top: sorted(each.top_logprobs.map(token)) })
    const tokens = (choice.logprobs?.content ?? []).map(made)
    yield { text: choice.delta.content ?? "", finish: choice.finish_reason, tokens }
  }
}

const sorted = top => top.sort((a, b) => b.logprob - a.logprob)
