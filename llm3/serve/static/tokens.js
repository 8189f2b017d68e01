// Texts whose tokens have colours, and the box with the numbers of a token.

const SURPRISE = [1, 2, 4, 6, 9], CHANGE = [-3, -1, -0.25, 0.25, 1, 3] // bits between two colours
const shown = new WeakMap() // {span: {logprob, top, parts, before}}

const shareOf = logprob => logprob === null ? 0 : Math.exp(logprob)
export const bits = logprob => Math.max(0, -logprob / Math.LN2)

export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties)
  made.append(...children)
  return made
}

// A span for some tokens that only together are a text.
function span(text, tokens) {
  const logprob = together(tokens.map(each => each.logprob))
  const made = element("span", { className: "token", textContent: text, tabIndex: -1 })
  shown.set(made, { logprob, top: tokens[0].top ?? [], parts: tokens.length, before: null })
  colour(made, "surprise")
  return made
}

// The log probability of all; null if one of them has none.
const together = logprobs => logprobs.includes(null) ? null : logprobs.reduce((sum, each) => sum + each, 0)

function colour(made, how) {
  const { logprob, before } = shown.get(made), known = logprob !== null && (how !== "change" || before !== null)
  let level = ""
  if (known && how === "change") level = `c${above(CHANGE, bits(logprob) - bits(before))}`
  else if (known) level = `s${above(SURPRISE, bits(logprob))}`
  made.className = `token ${level}${/^\r?\n/.test(made.textContent) ? " line" : ""}`
}

const above = (limits, value) => limits.filter(each => value >= each).length

// Colour the tokens below an element by "surprise", or by the "change" of bits.
export function recolour(root, how) {
  for (const each of root.querySelectorAll(".token")) colour(each, how)
}

const encoder = new TextEncoder()

// The bytes of a token; where they are no whole characters, the server writes them as "bytes:\xe6\x95".
function bytesOf(name) {
  const written = /^bytes:(?:\\x[0-9a-f]{2})+$/.test(name) ? name.match(/(?<=\\x)../g) : null
  return written ? Uint8Array.from(written, each => parseInt(each, 16)) : encoder.encode(name)
}

// A text that grows. Tokens may come before the text that they belong to, and a character can have several.
export class Growing {
  constructor(box) {
    this.box = box
    this.text = this.pending = ""
    this.queue = []
    this.count = this.nats = 0
    this.decoder = new TextDecoder("utf-8", { ignoreBOM: true })
  }

  // complete: no more will come.
  add(text, tokens, complete = false) {
    this.text += text
    this.pending += text
    // a character belongs to the token that completes it
    const piece = name => this.decoder.decode(bytesOf(name), { stream: true })
    this.queue.push(...tokens.map(each => ({ ...each, piece: piece(each.text) })))
    for (const each of tokens) this.nats -= each.logprob ?? 0
    this.count += tokens.length
    while (this.pending && this.next(complete));
  }

  next(complete) {
    const { pending, queue } = this
    if (!queue.length) return this.put(pending, 0)
    const number = 1 + queue.findIndex(each => each.piece), first = number ? queue[number - 1].piece : ""
    if (number && pending.startsWith(first)) return this.put(first, number)
    const stuck = complete || queue.length > 16
    if (!stuck && (!number || first.startsWith(pending))) return false
    // the text is not that of the tokens: go on where a later token fits
    for (let later = number; later < queue.length; later++) {
      const at = queue[later].piece ? pending.indexOf(queue[later].piece, 1) : -1
      if (at > 0) return this.put(pending.slice(0, at), later)
    }
    return stuck ? this.put(pending, queue.length) : false
  }

  put(text, number) {
    const tokens = this.queue.splice(0, number)
    this.box.append(tokens.length ? span(text, tokens) : text)
    this.pending = this.pending.slice(text.length)
    reachable(this.box)
    return true
  }
}

// A text that was read. tokens: [{start, end, logprob, top}], in characters. before: `byPlace` of the parent's.
export function readText(box, text, tokens, before) {
  const letters = [...text], slice = (from, to) => letters.slice(from, to).join("")
  let place = 0, group = []
  const put = end => {
    const made = span(slice(place, end), group)
    shown.get(made).before = together(group.map(each => before?.get(keyOf(each)) ?? null))
    box.append(made)
    place = end
    group = []
  }
  tokens.forEach((each, number) => {
    if (each.start > place && !group.length) {
      box.append(slice(place, each.start))
      place = each.start
    }
    group.push(each)
    if (each.end > place && !(tokens[number + 1]?.start < each.end)) put(each.end)
  })
  if (group.length && place < letters.length) put(letters.length)
  box.append(slice(place))
  reachable(box)
}

const keyOf = each => `${each.start}-${each.end}`
export const byPlace = tokens => new Map(tokens.map(each => [keyOf(each), each.logprob]))

// Tab stops at one token of a text; the arrow keys go on from there.
function reachable(box) {
  const first = box.querySelector(".token")
  if (first && !box.querySelector(".token[tabindex='0']")) first.tabIndex = 0
}

// Rows of a name, a number and a bar. rows: [{name, share, chosen}]
export function bars(rows) {
  const list = element("dl", { className: "bars" })
  for (const { name, share, chosen } of rows) {
    const fill = element("i"), className = chosen ? "chosen" : ""
    fill.style.width = `${100 * share}%`
    const bar = element("dd", { className: "bar" }, fill)
    bar.setAttribute("aria-hidden", "true")
    const number = element("dd", { textContent: percent(share), className: `share ${className}` })
    list.append(element("dt", { textContent: name, className, dir: "auto" }), number, bar)
  }
  return list
}

export const percent = share => `${share >= 0.01 || !share ? (100 * share).toFixed(1) : (100 * share).toPrecision(1)} %`

// A token as it is, on one line.
function visible(text) {
  const code = letter => `\\x${letter.charCodeAt(0).toString(16).padStart(2, "0")}`
  return text.replace(/ /g, "␣").replace(/\r?\n/g, "⏎").replace(/\t/g, "⇥").replace(/\p{Cc}/gu, code)
}

// Show the numbers of the token below the pointer, or of the one with the focus.
export function watch(root, tip) {
  let current = null, later = 0
  const hide = () => {
    clearTimeout(later)
    current?.classList.remove("shown")
    current?.removeAttribute("aria-describedby")
    current = null
    tip.hidden = true
  }
  const show = token => {
    if (token === current) return clearTimeout(later)
    hide()
    current = token
    token.classList.add("shown")
    token.setAttribute("aria-describedby", tip.id)
    tip.replaceChildren(...numbers(token))
    tip.hidden = false
    place(tip, token)
  }
  const tokenOf = event => { const found = event.target.closest?.(".token"); return shown.has(found) ? found : null }
  const hideLater = () => { if (current !== document.activeElement) later = setTimeout(hide, 200) }
  root.addEventListener("pointermove", event => tokenOf(event) && show(tokenOf(event)))
  root.addEventListener("focusin", event => tokenOf(event) && show(tokenOf(event)))
  root.addEventListener("focusout", hide)
  root.addEventListener("pointerout", hideLater)
  tip.addEventListener("pointerenter", () => clearTimeout(later))
  tip.addEventListener("pointerleave", hideLater)
  document.addEventListener("click", event => {
    const token = tokenOf(event)
    if (token) { token.focus({ preventScroll: true }); show(token) } else if (!tip.contains(event.target)) hide()
  })
  document.addEventListener("keydown", event => { if (event.key === "Escape") hide() })
  root.addEventListener("keydown", move)
  return hide
}

function move(event) {
  const token = event.target.closest(".token"), box = token?.closest(".text-of")
  if (!box || event.ctrlKey || event.altKey || event.metaKey) return
  const all = [...box.querySelectorAll(".token")], at = all.indexOf(token)
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[event.key]
  if (to === undefined || !all[to]) return
  event.preventDefault()
  token.tabIndex = -1
  all[to].tabIndex = 0
  all[to].focus()
}

function numbers(token) {
  const { logprob, top, parts, before } = shown.get(token), text = token.textContent
  const code = element("code", { textContent: visible(text), dir: "auto" })
  if (logprob === null) return [element("p", {}, code, " has no probability: nothing is before it.")]
  const own = bits(logprob), found = [element("p", {}, code, ` ${percent(shareOf(logprob))}, ${own.toFixed(2)} bits`)]
  const alternatives = top.length ? "; the alternatives of the first:" : ""
  if (parts > 1) found.push(element("p", { textContent: `${parts} tokens together${alternatives}` }))
  if (before !== null) {
    const change = own - bits(before)
    const than = `${change > 0 ? "more" : "fewer"} than the parent (${bits(before).toFixed(2)})`
    found.push(element("p", { textContent: `${Math.abs(change).toFixed(2)} ${than}` }))
  }
  const row = each => ({ name: visible(each.text), share: shareOf(each.logprob), chosen: each.text === text })
  const rows = top.map(row)
  if (rows.length && parts === 1 && !rows.some(each => each.chosen)) rows.push(row({ text, logprob }))
  return rows.length ? [...found, bars(rows)] : found
}

function place(tip, token) {
  const box = token.getClientRects()[0] ?? token.getBoundingClientRect(), gap = 6
  const below = box.bottom + gap + tip.offsetHeight <= innerHeight || box.top < tip.offsetHeight + gap
  const left = Math.max(8, Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8))
  tip.style.left = `${left + scrollX}px`
  tip.style.top = `${(below ? box.bottom + gap : box.top - gap - tip.offsetHeight) + scrollY}px`
}
