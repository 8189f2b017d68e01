// What a column shows for each task. Each function draws the answer and returns it as a text to be read aloud.

import { Problem, chatted, continued, post } from "./requests.js"
import { Growing, bars, byPlace, element, readText } from "./tokens.js"

const MOST_BARS = 12
const ENDS = { stop: "ended by itself", length: "reached the max tokens" }
const settingsOf = state => ({
  max_tokens: Number(state.max_tokens), temperature: Number(state.temperature), top_p: Number(state.top_p),
  seed: Number(state.seed),
})
const paragraph = (className, text = "") => element("p", { className, textContent: text, dir: "auto" })

// A box for the tokens of a stage.
function tokenBox(column, className = "") {
  const box = element("div", { className: `text-of ${className}`, dir: "auto" })
  box.setAttribute("role", "group")
  box.setAttribute("aria-label", `Text of ${column.name}; the arrow keys go from token to token`)
  return box
}

async function grow(column, box, pieces) {
  const growing = new Growing(box)
  box.classList.add("writing")
  let finish = ""
  try {
    for await (const each of pieces) {
      growing.add(each.text, each.tokens)
      finish = each.finish || finish
      column.foot.textContent = counted(growing)
    }
  } finally {
    growing.add("", [], true)
    box.classList.remove("writing")
    column.foot.textContent = [counted(growing), ENDS[finish]].filter(Boolean).join(" · ")
  }
  return growing.text
}

function counted({ count, nats }) {
  if (!count) return ""
  return `${count} token${count > 1 ? "s" : ""} · ${(Math.max(0, nats) / Math.LN2 / count).toFixed(2)} bits each`
}

async function completions(column, state, signal) {
  const box = tokenBox(column)
  box.append(element("span", { className: "given", textContent: shortened(state.text) }))
  column.body.replaceChildren(box)
  return grow(column, box, continued(column.name, state.text, settingsOf(state), signal))
}

// The end of a long prompt.
function shortened(text, most = 300) {
  const letters = [...text]
  return letters.length > most ? `…${letters.slice(-most).join("")}` : text
}

// Turns that were answered under the same settings and system prompt stay; the others are asked one after another.
async function chat(column, state, signal) {
  const asked = state.mode === "chat" ? state.turn : [state.text], settings = settingsOf(state)
  const first = state.system.trim() ? [{ role: "system", content: state.system }] : []
  const key = JSON.stringify([settings, first]), old = column.turns
  let same = 0
  const stays = (turn, at) => turn?.key === key && turn.user === asked[at] && turn.box.isConnected
  while (stays(old[same], same)) same++
  if (same === asked.length) same--
  column.turns = old.slice(0, same)
  column.body.replaceChildren(...column.turns.flatMap(each => [each.said, each.box]))
  for (const user of asked.slice(same)) {
    const said = paragraph("turn", user), box = tokenBox(column), before = column.turns
    const messages = [...first, ...before.flatMap(each => [
      { role: "user", content: each.user }, { role: "assistant", content: each.text },
    ])]
    column.body.append(said, box)
    const turn = { key, user, said, box, text: "" }
    column.turns = [...before, turn]
    messages.push({ role: "user", content: user })
    turn.text = await grow(column, box, chatted(column.name, messages, settings, signal))
  }
  return column.turns.at(-1).text
}

async function classify(column, state, signal) {
  const { results: [{ labels, predicted }] } = await post("/classify", { model: column.name, text: state.text }, signal)
  const rows = labels.slice(0, MOST_BARS).map(each => ({
    name: each.label, share: each.probability, chosen: predicted.includes(each.label),
  }))
  column.body.replaceChildren(bars(rows))
  const left = labels.length - rows.length
  if (left) column.body.append(paragraph("given", `and ${left} less likely labels`))
  return predicted.join(", ") || "no label"
}

async function score(column, state, signal) {
  const found = await post("/score", { model: column.name, text: state.text }, signal)
  column.score = found
  if (!found.bits_per_byte) throw new Problem("The text is too short: no token has others before it.")
  return `${found.bits_per_byte.toFixed(3)} bits per byte`
}

// Draw what a column has read; parent: the column to compare with, or null.
function drawRead(column, state, parent) {
  const { score: found } = column, box = tokenBox(column)
  readText(box, state.text, found.tokens, parent && byPlace(parent.score.tokens))
  const unit = element("small", { textContent: " bits per byte" })
  const number = element("p", { className: "number" }, found.bits_per_byte.toFixed(3), unit)
  column.body.replaceChildren(number, box)
  column.foot.textContent = counted({ count: found.tokens.length, nats: found.nats })
}

async function fill(column, state, signal) {
  if (!state.text.includes(column.mask)) {
    column.body.replaceChildren(paragraph("given", `Write ${column.mask} where a token is to be filled in.`))
    return "no mask in the text"
  }
  const { results } = await post("/fill", { model: column.name, text: state.text, top_k: 5 }, signal)
  const box = tokenBox(column), said = []
  state.text.split(column.mask).forEach((part, at) => {
    if (at) box.append(element("mark", { className: "found", textContent: results[at - 1]?.[0]?.token ?? column.mask }))
    box.append(part)
  })
  column.body.replaceChildren(box)
  results.forEach((proposals, at) => {
    if (results.length > 1) column.body.append(paragraph("given", `Mask ${at + 1}`))
    const row = ({ token, probability }, rank) => ({ name: token, share: probability, chosen: !rank })
    column.body.append(bars(proposals.map(row)))
    said.push(proposals[0].token)
  })
  return said.join(", ")
}

async function spans(column, state, signal) {
  const body = { model: column.name, question: state.question, context: state.text }
  const { answer, start, end, score: points } = await post("/spans", body, signal)
  const letters = [...state.text], box = tokenBox(column), part = (from, to) => letters.slice(from, to).join("")
  const mark = element("mark", { className: "found", textContent: part(start, end) })
  if (answer) box.append(part(0, start), mark, part(end))
  column.body.replaceChildren(paragraph("number", answer || "No answer in the context"), ...(answer ? [box] : []))
  column.foot.textContent = `score ${points.toFixed(2)} above “no answer”`
  return answer || "no answer"
}

export const answers = { completions, chat, classify, score, drawRead, fill, spans }
