// The page: the form, and a column for each stage.

import { answers } from "./answers.js"
import { ofForm, read, show, written } from "./state.js"
import { element, recolour, watch } from "./tokens.js"

const form = document.getElementById("ask"), area = form.elements.text, status = document.getElementById("status")
const buttons = Object.fromEntries(["stop", "again", "mask", "fresh"].map(id => [id, document.getElementById(id)]))
const columns = [...document.querySelectorAll("article")].map(root => ({
  root, ...root.dataset, tasks: root.dataset.tasks.split(" "),
  body: root.querySelector(".answer"), foot: root.querySelector(".foot"), turns: [],
}))
const comparison = document.getElementById("comparison"), legend = document.getElementById("legend")
const answering = document.getElementById("columns"), apart = document.getElementById("apart")
const hideTip = watch(answering, document.getElementById("tip"))
let asked = null, count = 0 // {state, controller, done} of what was asked last; how often something was asked
let turns = [] // the messages of the chat so far

const HINTS = {
  completions: "Continues the text.", chat: "Answers as in a chat.", classify: "Gives the probability of each label.",
  score: "Reads the text.", fill: "Proposes tokens for masks.", spans: "Marks the answer in the context.",
}
const LACKS = {
  completions: "Does not continue texts.", chat: "Was trained without a chat template.", classify: "Has no labels.",
  score: "Does not give probabilities of a text from left to right.", fill: "Does not fill in masks.",
  spans: "Does not mark answers in a context.",
}

const mode = () => form.elements.mode.value
const taskOf = (column, how) => how === "own" ? column.own : column.tasks.includes(how) ? how : ""

// What the form shows for a mode. Stages that cannot answer stand below the columns.
function arrange() {
  const chosen = form.querySelector("input[name=mode]:checked"), how = chosen.value
  document.getElementById("help").textContent = chosen.dataset.help
  area.parentElement.firstElementChild.textContent = chosen.dataset.text
  form.elements.question.parentElement.hidden = how !== "spans"
  form.elements.system.parentElement.hidden = how !== "chat"
  const draws = columns.some(each => ["completions", "chat"].includes(taskOf(each, how)))
  form.querySelector(".settings").disabled = buttons.again.hidden = !draws
  form.querySelector(".settings").hidden = !draws
  const mask = columns.find(each => each.mask && taskOf(each, how) === "fill")?.mask
  buttons.mask.hidden = !mask
  if (mask) buttons.mask.value = mask
  buttons.fresh.hidden = how !== "chat" || !turns.length
  const list = document.getElementById("turns")
  list.hidden = how !== "chat" || !turns.length
  list.replaceChildren(...turns.map(text => element("li", { textContent: text, dir: "auto" })))
  const ticked = new Set(new FormData(form).getAll("stage"))
  for (const each of columns) {
    each.root.hidden = !ticked.has(each.name)
    each.body.dataset.hint = HINTS[taskOf(each, how)] ?? unable(each, how)
  }
  const place = each => taskOf(each, how) ? answering : apart
  if (columns.some(each => each.root.parentElement !== place(each)))
    for (const each of columns) place(each).append(each.root)
}

// again: what the address says already, so that the history gets no entry.
async function ask(again = false) {
  if (!form.reportValidity()) return
  const how = mode(), own = ++count
  if (how === "chat" && area.value.trim()) {
    turns = [...turns, area.value]
    area.value = ""
  }
  if (how === "chat" ? !turns.length : !area.value) return area.focus()
  stop()
  await asked?.done
  if (own !== count) return
  hideTip()
  arrange()
  const state = ofForm(form, how === "chat" ? turns : []), controller = new AbortController()
  if (!again && location.hash !== written(state)) history.pushState(null, "", written(state))
  document.title = `${(state.turn.at(-1) ?? state.text).slice(0, 60)} – Ask every stage`
  status.replaceChildren()
  comparison.hidden = legend.hidden = true
  buttons.stop.disabled = false
  for (const each of columns) each.score = each.drawn = undefined
  const open = columns.filter(each => !each.root.hidden)
  const done = Promise.all(open.map(each => answer(each, taskOf(each, how), state, controller.signal)))
  asked = { state, controller, done }
  await done
  if (own === count) buttons.stop.disabled = true
}

async function answer(column, task, state, signal) {
  const { root, body, foot } = column
  foot.textContent = ""
  if (task !== "chat") body.replaceChildren()
  if (!task) return body.append(element("p", { className: "given", textContent: unable(column, state.mode) }))
  root.setAttribute("aria-busy", "true")
  try {
    const said = await answers[task](column, state, signal)
    if (task === "score") compare(state)
    status.append(element("p", { textContent: `${column.name}: ${said}` }))
  } catch (error) {
    if (error.name === "AbortError") foot.textContent = [foot.textContent, "stopped"].filter(Boolean).join(" · ")
    else {
      problem(column, task, error.message)
      status.append(element("p", { textContent: `${column.name}: ${error.message}` }))
    }
  } finally {
    root.removeAttribute("aria-busy")
    legend.hidden = !answering.querySelector(".token")
    colours()
  }
}

function unable(column, how) {
  if (how !== "own") return LACKS[how]
  return column.tasks.includes("spans") ? "Answers questions: choose Question above." : "Cannot be asked."
}

// What went wrong in a column, and a way to ask it again.
function problem(column, task, text) {
  const { state, controller } = asked, button = element("button", { type: "button", textContent: "Ask again" })
  button.addEventListener("click", () => {
    asked.done = Promise.all([asked.done, answer(column, task, state, controller.signal)])
  })
  column.body.append(element("p", { className: "problem" }, text, button))
}

function stop() {
  asked?.controller.abort()
  buttons.stop.disabled = true
}

// The nearest ancestor of a column that has read the text as well; null if none has.
function parentOf(column) {
  for (let name = column.parent; name;) {
    const found = columns.find(each => each.name === name)
    if (found.score?.bits_per_byte) return found
    name = found.parent
  }
  return null
}

// The table of bits per byte, and the changes of tokens, with what is known so far.
function compare(state) {
  const read = columns.filter(each => each.score?.bits_per_byte), most = Math.max(...read.map(each => each.score.bits_per_byte))
  const rows = read.map(each => {
    const value = each.score.bits_per_byte, parent = parentOf(each), fill = element("i")
    fill.style.width = `${100 * value / most}%`
    const change = parent ? value - parent.score.bits_per_byte : null
    const head = element("th", { scope: "row", textContent: each.name })
    const since = change === null ? "–" : `${signed(change)} since ${parent.name}`
    if (each.drawn !== parent) answers.drawRead(each, state, parent)
    each.drawn = parent
    return element("tr", {}, head, element("td", { textContent: value.toFixed(3) }),
      element("td", { textContent: since, className: !change ? "" : change > 0 ? "worse" : "better" }),
      element("td", { className: "bar-of" }, element("div", { className: "bar" }, fill)),
      element("td", { textContent: each.score.nats.toFixed(1) }),
      element("td", { textContent: each.score.tokens.length }))
  })
  const heads = ["stage", "bits per byte", "change", "", "nats", "tokens"]
  const head = element("tr", {}, ...heads.map(text => element("th", { scope: "col", textContent: text })))
  const size = `The text has ${read[0].score.bytes} bytes. Fewer bits: known better.`
  const caption = element("caption", { textContent: size })
  const table = element("table", {}, caption, element("thead", {}, head), element("tbody", {}, ...rows))
  comparison.replaceChildren(table)
  comparison.hidden = false
  colours()
}

const signed = value => (value > 0 ? "+" : value < 0 ? "−" : "±") + Math.abs(value).toFixed(3)

// Colour the tokens as the legend says.
function colours() {
  const comparable = columns.some(each => each.score && parentOf(each))
  legend.querySelector("fieldset").hidden = !comparable
  const how = comparable ? legend.querySelector("input:checked").value : "surprise"
  for (const each of legend.querySelectorAll("p")) each.hidden = each.dataset.colour !== how
  recolour(answering, how)
}

// Ask what the address says.
function reopen() {
  const state = read(location.hash)
  if (!state.mode) return arrange()
  turns = state.turn
  show(form, state)
  arrange()
  if (state.text || turns.length) ask(true)
}

form.addEventListener("submit", event => { event.preventDefault(); ask() })
form.addEventListener("change", arrange)
form.addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); ask() }
})
document.getElementById("lineage").addEventListener("change", arrange)
buttons.stop.addEventListener("click", stop)
buttons.again.addEventListener("click", () => {
  form.elements.seed.value = Number(form.elements.seed.value) + 1
  ask()
})
buttons.fresh.addEventListener("click", () => {
  stop()
  turns = []
  for (const each of columns) { each.turns = []; each.body.replaceChildren(); each.foot.textContent = "" }
  history.pushState(null, "", written(ofForm(form, turns)))
  arrange()
  area.focus()
})
buttons.mask.addEventListener("click", () => {
  area.setRangeText(buttons.mask.value, area.selectionStart, area.selectionEnd, "end")
  area.focus()
})
legend.addEventListener("change", () => {
  colours()
  if (!asked) return
  asked.state.colour = legend.querySelector("input:checked").value
  history.replaceState(null, "", written(asked.state))
})
addEventListener("popstate", reopen)
reopen()
