// The state of the page is in its address, after "#": a link asks the same again. The keys are in docs/serve.md.

const TEXTS = ["mode", "text", "question", "system", "max_tokens", "temperature", "top_p", "seed", "colour"]
const LISTS = ["turn", "without"]

export function written(state) {
  const found = new URLSearchParams()
  for (const key of TEXTS) if (state[key]) found.set(key, state[key])
  for (const key of LISTS) for (const each of state[key]) found.append(key, each)
  return "#" + found
}

// What an address says; null where it says nothing.
export function read(hash) {
  const found = new URLSearchParams(hash.replace(/^#/, "")), state = {}
  for (const key of TEXTS) state[key] = found.get(key)
  for (const key of LISTS) state[key] = found.getAll(key)
  return state
}

// The state that the form shows. turn: the messages of a chat so far.
export function ofForm(form, turn) {
  const fields = new FormData(form), chosen = fields.getAll("stage")
  const state = { turn, without: [...all("stage")].map(each => each.value).filter(each => !chosen.includes(each)) }
  for (const key of TEXTS) state[key] = fields.get(key) ?? ""
  state.colour = document.querySelector("input[name=colour]:checked").value
  if (state.mode !== "spans") state.question = ""
  if (state.mode !== "chat") state.system = ""
  if (state.mode !== "score") state.colour = ""
  return state
}

// Let the form show a state; what it does not say stays as it is, but for the system prompt of a chat.
export function show(form, state) {
  for (const key of ["mode", "colour"])
    for (const each of all(key)) if (state[key]) each.checked = each.value === state[key]
  for (const key of TEXTS) {
    const field = form.elements[key]
    if (state[key] !== null && field && "value" in field && key !== "mode" && key !== "colour") field.value = state[key]
  }
  if (state.mode === "chat") form.elements.system.value = state.system ?? ""
  for (const each of all("stage")) each.checked = !state.without.includes(each.value)
}

const all = name => document.querySelectorAll(`input[name=${name}]`)
