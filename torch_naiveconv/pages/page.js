// Shows the scenes that trace.py computed; computes nothing but positions on the screen.
// Start reading at render(): it draws the state {scene, view, element, step}.
"use strict";

const SCENES = JSON.parse(document.getElementById("scenes-data").textContent);
const SIZE = 44;
const at = (id) => document.getElementById(id);
const state = { scene: 0, view: "output", rule: "first", element: 0, step: 0, timer: null };

const scene = () => SCENES[state.scene];
const viewOf = (key) => scene().views.find((view) => view.key === key);
const view = () => viewOf(state.view);
const steps = () => view().steps[state.element];
const tensor = (name) => scene().tensors[name];

// ---- words -----------------------------------------------------------------------------------

const minus = (text) => String(text).replace("-", "−");

function short(text) {
  if (text.length <= 5) return minus(text);
  const value = Number(text), size = Math.abs(value);
  if (!Number.isFinite(value)) return minus(text);
  if (size >= 1e4 || size < 0.005) return minus(value.toExponential(0));
  return minus(value.toFixed(size < 10 ? 2 : size < 100 ? 1 : 0));
}

function place(name, index) {
  const { shape, origin } = tensor(name);
  const [N, C, D, H, W] = shape;
  const w = index % W, h = Math.floor(index / W) % H, d = Math.floor(index / (W * H)) % D;
  const plane = Math.floor(index / (W * H * D));
  return { n: Math.floor(plane / C), c: plane % C, d: d - origin[0], h: h - origin[1], w: w - origin[2] };
}

function indexText(name, index) {
  const { n, c, d, h, w } = place(name, index);
  const [N, C] = tensor(name).shape;
  const spatial = name.endsWith("bias") ? [] : [d, h, w].slice(3 - scene().dims);
  const leading = name.endsWith("bias") ? [c] : N === 1 && C === 1 ? [] : [n, c];
  return minus("[" + [...leading, ...spatial].join(", ") + "]").replaceAll("-", "−");
}

const shortName = (name) =>
  name.replace("grad_output", "grad_out").replace(/grad_input.*/, "grad_in").replace("grad_weight", "grad_w");
const nameText = (name, index) => shortName(name) + indexText(name, index);
const valueOf = (name, index) => tensor(name).values[index];

// ---- grids -----------------------------------------------------------------------------------

const NS = "http://www.w3.org/2000/svg";
function svg(tag, attributes, ...children) {
  const element = document.createElementNS(NS, tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}
function html(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

const grids = {}; // name of a tensor -> its cells, in order

function drawCell(name, index, x, y, largest) {
  const value = valueOf(name, index);
  const { origin, inside } = tensor(name);
  const { d, h, w } = place(name, index);
  const isInside = [d, h, w].every((p, i) => p >= 0 && p < inside[i]);
  const number = Number(value);
  const cell = svg("g", {
    class: "cell" + (isInside ? (number > 0 ? " plus" : number < 0 ? " minus" : "") : " ring"),
    role: "gridcell", tabindex: -1, transform: `translate(${x} ${y})`,
    "data-tensor": name, "data-index": index,
    "aria-label": `${nameText(name, index)}${isInside ? "" : ", padding"}: ${minus(value) || "nothing"}`,
  });
  const strength = Number.isFinite(number) && largest > 0 ? Math.abs(number) / largest : 0;
  cell.style.setProperty("--v", strength.toFixed(2));
  const title = svg("title", {}, `${nameText(name, index)} = ${minus(value)}`);
  cell.append(
    title,
    svg("rect", { class: "box", width: SIZE, height: SIZE }),
    svg("rect", { class: "mark", x: 2.5, y: 2.5, width: SIZE - 5, height: SIZE - 5, rx: 3 }),
    svg("text", { class: "value", x: SIZE / 2, y: SIZE / 2 + 3 }, short(value)),
    svg("text", { class: "badge", x: 5, y: 12 }),
  );
  return cell;
}

function drawTensor(name, isResult) {
  const t = tensor(name), [N, C, D, H, W] = t.shape;
  const finite = t.values.map(Number).filter(Number.isFinite).map(Math.abs);
  const largest = Math.max(0, ...finite);
  const planes = html("div", { class: H === 1 && D === 1 ? "planes stacked" : "planes", style: `--columns:${W}` });
  const cells = [];
  for (let plane = 0; plane < N * C * D; ++plane) {
    const n = Math.floor(plane / (C * D)), c = Math.floor(plane / D) % C, d = (plane % D) - t.origin[0];
    const drawing = svg("svg", {
      viewBox: `-2 -2 ${W * SIZE + 4} ${H * SIZE + 4}`, width: W * SIZE + 4, role: "grid",
      "aria-label": `${t.label}, ${H} by ${W}`,
    });
    for (let h = 0; h < H; ++h) {
      const row = svg("g", { role: "row" });
      for (let w = 0; w < W; ++w) {
        cells.push(drawCell(name, cells.length, w * SIZE, h * SIZE, largest));
        row.append(cells.at(-1));
      }
      drawing.append(row);
    }
    cells[plane * H * W].setAttribute("tabindex", 0);
    const isFilter = name.includes("weight"), words = [];
    if (N > 1) words.push((isFilter ? "filter " : "sample ") + n);
    if (C > 1) words.push("channel " + c);
    if (D > 1) words.push("depth " + minus(d));
    const label = words.length ? [html("span", {}, words.join(", "))] : [];
    planes.append(html("div", { class: "plane" }, ...label, drawing));
  }
  grids[name] = cells;
  const [d, h, w] = t.inside;
  const size = [N, C, d, h, w].filter((_, i) => i < 2 || i >= 5 - scene().dims).join(" × ");
  const caption = name.endsWith("bias") ? "" : ` ${size}`;
  return html(
    "figure", { class: isResult ? "result" : "", "data-tensor": name },
    html("figcaption", {}, t.label + " ", html("small", {}, caption)), planes,
  );
}

// ---- the steps of one element ------------------------------------------------------------------

const operands = () => view().operands;

// The two operand positions of a step: [[tensor, index], ...].
function touched(step) {
  const [a, b] = operands();
  switch (step[0]) {
    case "term": return b ? [[a, step[1]], [b, step[2]]] : [[a, step[1]]];
    case "skip": return view().kind === "scan" ? [[a, step[1]]] : [[b, step[2]]];
    case "look": return [[a, step[1]]];
    case "add": case "pass": return [[a, step[1]]];
    default: return [];
  }
}

function stepText(step) {
  const [a, b] = operands();
  switch (step[0]) {
    case "term": {
      const x = valueOf(a, step[1]), y = b ? valueOf(b, step[2]) : "1";
      return {
        who: nameText(a, step[1]) + (b ? " × " + nameText(b, step[2]) : " × 1"),
        what: `${minus(x)} × ${minus(y)} = ${minus(step[3])}`, so: minus(step[4]), kind: "sum",
      };
    }
    case "skip":
      return view().kind === "scan"
        ? { who: nameText(a, step[1]), what: "padding: not looked at", so: "", kind: "" }
        : { who: nameText(b, step[2]), what: `meets no ${a.replace("grad_", "")}, adds nothing`, so: "", kind: "" };
    case "look": {
      const leads = step[1] === step[2];
      return {
        who: nameText(a, step[1]) + " = " + minus(valueOf(a, step[1])),
        what: leads ? "★ takes the lead" : "stays behind", so: minus(step[3]), kind: "best",
      };
    }
    case "add":
      return {
        who: "window " + indexText(a, step[1]) + " chose this input ★",
        what: `gives ${minus(step[2])}`, so: minus(step[3]), kind: "sum",
      };
    case "pass":
      return { who: "window " + indexText(a, step[1]), what: "chose another: gives nothing", so: "", kind: "" };
    case "cut": return { who: "", what: "cut: the group is added to the total", so: minus(step[1]), kind: "total" };
    case "bias": return { who: "", what: `the bias comes last: + ${minus(step[1])}`, so: minus(step[2]), kind: "total" };
  }
}

function drawSteps() {
  const list = at("steps");
  list.textContent = "";
  let number = 0;
  for (const step of steps()) {
    const text = stepText(step);
    const counted = step[0] !== "cut" && step[0] !== "bias";
    if (counted) number += 1;
    const so = text.kind ? `${text.kind} ${text.so}` : "";
    const row = html("li", { class: step[0], "data-kind": step[0], "data-so": text.so },
      html("span", { class: "no" }, counted ? number : "—"));
    if (text.who) row.append(html("span", { class: "who" }, text.who), html("span", {}));
    row.append(html("span", { class: "what" }, text.what), html("span", { class: "so" }, so));
    list.append(row);
  }
  const name = view().result, value = valueOf(name, state.element);
  list.append(html("li", { class: "end", "data-kind": "end", "data-so": minus(value) },
    html("span", { class: "no" }, "="), html("span", { class: "what" }, nameText(name, state.element)),
    html("span", { class: "so" }, minus(value))));
}

function story() {
  const rows = steps(), count = (kind) => rows.filter((step) => step[0] === kind).length;
  const terms = count("term"), skipped = count("skip"), cuts = count("cut");
  const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
  if (view().kind === "scan")
    return `Its window looks at ${plural(count("look"), "input")}` + (skipped ? ` and passes ${skipped} in the padding.` : ".");
  if (view().kind === "route")
    return `${plural(count("add") + count("pass"), "window")} saw this input, ${count("add")} chose it.`;
  const groups = ` in ${plural(cuts, "group")}`;
  if (skipped) {
    const met = operands()[0] === "input" ? `${plural(terms, "input")} reached it` : `It fed ${plural(terms, "output")}`;
    return `${met}; ${plural(skipped, "tap")} met none. ${terms + skipped} numbered terms${groups}.`;
  }
  return `${plural(terms, "term")}${groups}${view().samples > 1 ? ", cut at every sample" : ""}.`;
}

const HELP = {
  conv: {
    output: "Choose an output: its window lights up, and the products of window and filter are added in the order of the numbers.",
    grad_input: "Choose an input: it fed the lit outputs, each through the weight of the same number. Their gradients come back through the same weights.",
    grad_weight: "Choose a weight: it was multiplied with every lit input, once per output. Each output's gradient, times that input, is added.",
    grad_bias: "Choose a bias: it was added to every output of its channel, so it gathers all their gradients.",
  },
  conv_transpose: {
    output: "Choose an output: the lit inputs reach it, each through the weight of the same number. This is how a convolution's gradient reaches its input.",
    grad_input: "Choose an input: it was spread over the lit outputs; their gradients come back through the same weights, as in a convolution's forward pass.",
    grad_weight: "Choose a weight: each input met one output through it. The input times that output's gradient is added.",
    grad_bias: "Choose a bias: it was added to every output of its channel, so it gathers all their gradients.",
  },
  max_pool: {
    output: "Choose an output: its window is scanned in the order of the numbers; a later value takes the lead only if it is greater, or is NaN. ★ marks the winner.",
    grad: "Choose an input: every window that chose it (★) gives its gradient, and the gradients of overlapping windows add up.",
    compare: "The same call under the four tie rules, and what the article's listing would assign. Dashed and ≠: not what torch's rule (first) gives.",
  },
};

function helpText() {
  const family = scene().function.replace(/\d.*/, "");
  const texts = HELP[family];
  if (state.view === "all") return "Choose any number to see where it comes from, or what it fed.";
  return texts[state.view] ?? `${texts.grad} Here ${view().rule}.`;
}

// The two tabs without a sum: which grids they show.
function gridsOf(key) {
  if (key === "all") return Object.keys(scene().tensors);
  const rules = ["first", ...scene().compare.others];
  return ["input", "grad_output", "article", ...rules.map((rule) => "grad_input_" + rule)];
}

// ---- render ------------------------------------------------------------------------------------

function drawButtons(holder, items, isOn, choose, role) {
  holder.textContent = "";
  holder.hidden = items.length < 2;
  for (const [key, label] of items) {
    const on = isOn(key);
    const attribute = role === "tab" ? { role, "aria-selected": on } : { "aria-pressed": on };
    const button = html("button", { ...attribute, "data-key": key }, label);
    button.addEventListener("click", () => choose(key));
    holder.append(button);
  }
}

const isGradient = (key) => key.startsWith("grad_input_");

function drawChoices() {
  const rules = scene().views.filter((v) => v.rule);
  const tabs = scene().views.filter((v) => !v.rule).map((v) => [v.key, v.label]);
  if (rules.length) tabs.push(["grad_input_" + state.rule, "Input's gradient"], ["compare", "Tie rules, and the article"]);
  else tabs.push(["all", "All at once"]);
  drawButtons(at("scenes"), SCENES.map((s, i) => [i, s.title]), (i) => i === state.scene, (i) => setScene(i));
  drawButtons(at("tabs"), tabs, (key) => key === state.view, (key) => setView(key, firstElement(key)), "tab");
  const choices = rules.map((v) => [v.key, "ties = " + v.key.replace("grad_input_", "")]);
  drawButtons(at("rules"), isGradient(state.view) ? choices : [], (key) => key === state.view, (key) => setView(key, state.element));
}

function firstElement(key) {
  const chosen = viewOf(key);
  return chosen ? chosen.steps.findIndex((row) => row) : 0;
}

function setScene(index) {
  pause();
  state.scene = index;
  setView(state.view, state.element);
}

function setView(key, element) {
  pause();
  state.view = key;
  if (isGradient(key)) state.rule = key.replace("grad_input_", "");
  const result = viewOf(key)?.result;
  const names = result ? [...view().operands, result] : gridsOf(key);
  at("figures").replaceChildren(...names.map((name) => drawTensor(name, name === result)));
  at("figures").dataset.view = key;
  drawChoices();
  at("call").textContent = scene().call;
  at("facts").textContent = scene().facts.join("\n") + ` · ${scene().dtype}`;
  at("help").textContent = helpText();
  document.querySelector("main").classList.toggle("wide", !result);
  at("bar").hidden = at("sum").hidden = !result;
  if (result) setElement(element);
  else if (key === "compare") drawCompare();
}

function drawCompare() {
  const right = tensor("grad_input_first").values;
  for (const name of Object.keys(grids).filter((n) => n === "article" || isGradient(n)))
    grids[name].forEach((cell, i) => {
      const differs = tensor(name).values[i] !== right[i];
      cell.classList.toggle("differs", differs);
      cell.querySelector(".badge").textContent = differs ? "≠" : "";
    });
}

function setElement(element) {
  state.element = element;
  drawSteps();
  const name = view().result;
  const bits = tensor(name).bits[element];
  at("chosen").textContent = `${nameText(name, element)} = ${minus(valueOf(name, element))}`;
  at("chosen").title = `bits 0x${bits}`;
  at("story").textContent = `${story()} Bits 0x${bits}.`;
  setStep(steps().length);
}

function setStep(step) {
  state.step = Math.max(0, Math.min(step, steps().length));
  render();
}

// Marks what the chosen element has used so far; `step` steps are done, the last of them is "now".
function render() {
  for (const name of [...operands(), view().result])
    for (const cell of grids[name]) {
      cell.classList.remove("lit", "done", "now", "chosen");
      cell.querySelector(".badge").textContent = "";
    }
  const rows = steps(), finished = state.step === rows.length;
  let number = 0;
  rows.forEach((step, i) => {
    if (step[0] === "cut" || step[0] === "bias") return;
    number += 1;
    const skipped = step[0] === "skip" || step[0] === "pass";
    for (const [name, index] of touched(step)) {
      const cell = grids[name][index], badge = cell.querySelector(".badge");
      if (!skipped) cell.classList.add(i < state.step ? "done" : "lit");
      if (i === state.step - 1 && !finished) { cell.classList.add("now"); reveal(cell); }
      badge.textContent = badge.textContent || (skipped ? "·" : number);
    }
  });
  markWinners(rows);
  const chosen = grids[view().result][state.element];
  chosen.classList.add("chosen");
  reveal(chosen);
  const begin = rows.find((step) => step[0] === "term" || step[0] === "look" || step[0] === "add");
  if (begin && (finished || state.step === 0)) for (const [name, index] of touched(begin)) reveal(grids[name][index]);
  drawNow(rows, finished);
}

// Pooling: the stars of the scan so far, or the window that is being asked for its choice.
function markWinners(rows) {
  const star = (index) => { grids.input[index].querySelector(".badge").textContent += "★"; };
  if (view().kind === "scan") {
    const seen = rows.slice(0, state.step).filter((step) => step[0] === "look");
    if (seen.length) star(seen.at(-1)[2]);
  } else if (view().kind === "route") {
    const asked = state.step === rows.length ? rows.map((row) => row[1]) : rows.slice(state.step - 1, state.step).map((row) => row[1]);
    const stars = new Set();
    for (const window of asked) {
      for (const step of viewOf("output").steps[window]) grids.input[step[1]].classList.add("lit");
      for (const index of view().winners[window]) stars.add(index);
    }
    stars.forEach(star);
    grids.input[state.element].classList.add("chosen");
  }
}

function drawNow(rows, finished) {
  [...at("steps").children].forEach((row, i) => {
    row.classList.toggle("todo", i >= state.step && !(finished && i === rows.length));
    row.classList.toggle("now", !finished && i === state.step - 1);
  });
  const list = at("steps"), row = list.children[Math.max(0, state.step - 1)];
  if (!finished && row && list.scrollHeight > list.clientHeight) list.scrollTop = row.offsetTop - list.clientHeight / 2;
  const name = view().result, where = nameText(name, state.element);
  const playing = state.timer !== null;
  at("now").setAttribute("aria-live", playing ? "off" : "polite");
  if (finished) at("now").textContent = `${where} = ${minus(valueOf(name, state.element))}`;
  else if (state.step === 0) at("now").textContent = `${where}: start from +0`;
  else {
    const text = stepText(rows[state.step - 1]);
    at("now").textContent = `${state.step}/${rows.length}  ${text.what}${text.kind ? ` → ${text.kind} ${text.so}` : ""}`;
  }
  at("play").textContent = playing ? "pause" : "play";
  at("play").setAttribute("aria-label", playing ? "pause" : "play");
}

// Scroll a cell into its figure; the page itself stays where it is.
function reveal(cell) {
  const holder = cell.closest(".planes"), frame = holder.getBoundingClientRect(), box = cell.getBoundingClientRect();
  if (box.left < frame.left || box.right > frame.right)
    holder.scrollLeft += box.left + box.width / 2 - frame.left - frame.width / 2;
  if (box.top < frame.top || box.bottom > frame.bottom)
    holder.scrollTop += box.top + box.height / 2 - frame.top - frame.height / 2;
}

// ---- choosing ----------------------------------------------------------------------------------

// A number anywhere leads to the view in which it is the result.
function choose(name, index) {
  pause();
  const current = view()?.result === name;
  let key = state.view;
  if (!current) {
    const pool = "compare" in scene();
    const base = name.replace(/^grad_(input|weight|output|bias)$/, "$1");
    key = base === "output" ? "output"
      : isGradient(name) ? name
      : pool ? "grad_input_" + (name === "article" ? "first" : state.rule)
      : "grad_" + base;
  }
  if (!viewOf(key)?.steps[index]) {
    at("now").textContent = `${nameText(name, index)} is padding: nothing is stored there, and it gets no gradient`;
    return;
  }
  if (key === state.view) setElement(index);
  else setView(key, index);
  const target = grids[view().result][index];
  focusCell(target);
}

function focusCell(cell) {
  for (const other of cell.closest("svg").querySelectorAll('[tabindex="0"]')) other.setAttribute("tabindex", -1);
  cell.setAttribute("tabindex", 0);
  cell.focus({ preventScroll: true });
}

at("figures").addEventListener("click", (event) => {
  const cell = event.target.closest(".cell");
  if (cell) choose(cell.dataset.tensor, Number(cell.dataset.index));
});

const MOVES = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

at("figures").addEventListener("keydown", (event) => {
  const cell = event.target.closest(".cell");
  if (!cell) return;
  const name = cell.dataset.tensor, index = Number(cell.dataset.index);
  if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    choose(name, index);
  } else if (event.key in MOVES) {
    event.preventDefault();
    const [, , , H, W] = tensor(name).shape;
    const [down, right] = MOVES[event.key];
    const h = Math.floor(index / W) % H + down, w = (index % W) + right;
    if (h < 0 || h >= H || w < 0 || w >= W) return;
    const target = index + down * W + right;
    if (view()?.result === name && view().steps[target]) choose(name, target);
    else focusCell(grids[name][target]);
  }
});

// ---- animation: the steps of an element, then the next element, to the last -----------------------

function pause() {
  if (state.timer !== null) clearTimeout(state.timer);
  state.timer = null;
  if (view() && at("play").textContent.includes("pause")) render();
}

function nextElement() {
  const rows = view().steps;
  for (let i = state.element + 1; i < rows.length; ++i) if (rows[i]) return i;
  return -1;
}

function tick() {
  const speed = at("speed").value;
  if (state.step < steps().length && speed !== "element") {
    setStep(state.step + 1);
  } else {
    const next = nextElement();
    if (next < 0) {
      document.body.dataset.animation = "ended";
      pause();
      return;
    }
    setElement(next);
    if (speed !== "element") setStep(0);
  }
  state.timer = setTimeout(tick, speed === "element" ? 500 : Number(speed) * (state.step === steps().length ? 2 : 1));
}

function play() {
  document.body.dataset.animation = "playing";
  const ended = state.step === steps().length;
  if (ended && nextElement() < 0) setElement(firstElement(state.view));
  state.timer = setTimeout(tick, 0);
  if (ended) setStep(0);
  else render();
}

const ACTIONS = {
  first: () => setStep(0),
  back: () => setStep(state.step - 1),
  next: () => setStep(state.step + 1),
  last: () => setStep(steps().length),
};
for (const [id, action] of Object.entries(ACTIONS))
  at(id).addEventListener("click", () => { pause(); action(); });
at("play").addEventListener("click", () => (state.timer === null ? play() : pause()));

const KEYS = { p: "play", ",": "back", ".": "next", Home: "first", End: "last" };
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
  if (view() && event.key in KEYS) {
    event.preventDefault();
    at(KEYS[event.key]).click();
  }
});

// A link may say where to begin: #view=grad_input&element=7&step=3
function begin() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  state.scene = Number(wanted.get("scene") ?? 0);
  const key = wanted.get("view") ?? "output";
  setView(key, Number(wanted.get("element") ?? Math.max(0, firstElement(key))));
  if (wanted.has("step")) setStep(Number(wanted.get("step")));
}

document.body.prepend(svg("svg", { width: 0, height: 0, "aria-hidden": "true", style: "position:absolute" },
  svg("defs", {}, svg("pattern", { id: "hatch", width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
    svg("path", { d: "M0 0V6" })))));
begin();
