/* The pictures that move. Python computes a payload (mllm_nb/widgets.py), this file draws it: in a saved page, where
   `start` looks for the place, and in a running notebook, where anywidget calls `live`. Nothing is loaded from elsewhere.

   A widget is one function draw.KIND(root, payload, report). It fills `root` and calls report(value) when the reader
   chooses something. It may return a function that takes a value and shows it, for values set in Python. */
const mllmWidgets = (() => {
  "use strict";
  const draw = {};

  const STYLE = `
    :host { display: block; }
    .widget { font: 14px/1.45 system-ui, sans-serif; color: #111827; background: #fff; border: 1px solid #d1d5db;
              border-radius: 6px; padding: 10px 12px; max-width: 760px; box-sizing: border-box; }
    .title { font-weight: 600; margin: 0 0 6px; }
    .row { display: flex; flex-wrap: wrap; gap: 14px; align-items: flex-start; }
    .status { min-height: 2.9em; margin-top: 6px; }
    .hint { color: #4b5563; font-size: 12px; }
    fieldset { border: 0; padding: 0; margin: 0 0 8px; display: flex; gap: 12px; flex-wrap: wrap; }
    legend { float: left; padding: 0 8px 0 0; }
    label { cursor: pointer; }
    canvas { display: block; image-rendering: pixelated; touch-action: none; }
    [tabindex]:focus-visible, input:focus-visible { outline: 3px solid #0072B2; outline-offset: 2px; }
    .tokens { display: flex; flex-wrap: wrap; gap: 3px; padding: 4px; }
    .token { border: 1px solid #6b7280; border-radius: 3px; padding: 1px 4px; min-width: 10px; text-align: center;
             cursor: pointer; font: 12px/1.5 ui-monospace, monospace; border-bottom-width: 4px; white-space: pre; }
    .token.far { opacity: .38; }
    .token[aria-selected=true] { outline: 3px solid #000; outline-offset: 1px; opacity: 1; }
    .segment { flex-basis: 100%; height: 0; border-top: 2px dashed #6b7280; margin: 3px 0; }
    .swatch { display: inline-block; width: 12px; height: 12px; border: 1px solid #6b7280; margin: 0 4px -1px 0; }
    .swatch.line { height: 4px; margin-bottom: 3px; }
    .key { margin-right: 14px; white-space: nowrap; }
    table { border-collapse: collapse; margin-top: 6px; }
    th, td { text-align: left; padding: 1px 14px 1px 0; font-weight: 400; vertical-align: top; }
    th { color: #4b5563; }
    img.frame { max-width: 100%; display: block; }`;

  /* ---- tools that every widget shares ---- */

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (value !== null && value !== undefined) made.setAttribute(name, value);
    }
    made.append(...children);
    return made;
  }

  const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

  /* The colour map cividis at nine points; its lightness rises evenly, also for colour-blind readers. */
  const CIVIDIS = [[0, 34, 78], [18, 53, 112], [59, 73, 108], [87, 93, 109], [112, 113, 115], [138, 134, 120],
                   [165, 156, 116], [195, 179, 105], [254, 232, 56]];
  function cividis(value) {
    const place = clamp(value, 0, 1) * (CIVIDIS.length - 1), low = Math.min(Math.floor(place), CIVIDIS.length - 2);
    return CIVIDIS[low].map((start, i) => Math.round(start + (place - low) * (CIVIDIS[low + 1][i] - start)));
  }

  /* Where an arrow key leads on a grid; null for other keys. */
  function moved(key, index, columns, count) {
    const step = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns}[key];
    if (key === "Home") return 0;
    if (key === "End") return count - 1;
    if (step === undefined) return null;
    return index + step >= 0 && index + step < count ? index + step : index;
  }

  function choice(name, options, chosen, onchange) {
    const group = element("fieldset", {}, element("legend", {}, name));
    for (const option of options) {
      const input = element("input", {type: "radio", name, value: option, onchange: () => onchange(option)});
      input.checked = option === chosen;
      group.append(element("label", {}, input, " " + option));
    }
    return group;
  }

  function pixels(canvas, rows, columns, colour) {
    canvas.width = columns;
    canvas.height = rows;
    const context = canvas.getContext("2d"), data = context.createImageData(columns, rows);
    for (let i = 0; i < rows * columns; i++) data.data.set([...colour(i), 255], 4 * i);
    context.putImageData(data, 0, 0);
  }

  /* ---- an image as patches, its patches as rows of a matrix ---- */

  draw.patch_grid = (root, payload, report) => {
    const shown = 320, ratio = payload.height / payload.width, high = Math.round(shown * ratio);
    let size, index = 0;
    const image = new Image();
    const picture = element("canvas", {width: shown, height: high, tabindex: 0, role: "application",
      "aria-label": payload.title + ": patches of the image; arrow keys move, Home and End jump", "data-part": "image"});
    const table = element("canvas", {role: "img", "data-part": "matrix", style: `width:300px;height:${high}px`});
    const mark = element("div", {style: "position:absolute;left:-7px;width:314px;border:2px solid #D55E00;box-sizing:border-box;pointer-events:none"});
    const strip = element("canvas", {role: "img", "aria-label": "the numbers of this token", style: "width:300px;height:18px"});
    const zoom = element("canvas", {width: 96, height: 96, role: "img", "aria-label": "the chosen patch, enlarged"});
    const status = element("div", {class: "status", role: "status", "aria-live": "polite"});
    const count = element("div", {"data-part": "count"});

    function paint() {
      const context = picture.getContext("2d"), patch = shown / size.columns, tall = high / size.rows;
      context.drawImage(image, 0, 0, shown, high);
      context.strokeStyle = "rgba(255,255,255,.75)";
      context.lineWidth = 1;
      context.beginPath();
      for (let x = 1; x < size.columns; x++) { context.moveTo(x * patch, 0); context.lineTo(x * patch, high); }
      for (let y = 1; y < size.rows; y++) { context.moveTo(0, y * tall); context.lineTo(shown, y * tall); }
      context.stroke();
      const column = index % size.columns, row = Math.floor(index / size.columns);
      for (const [colour, width] of [["#fff", 6], ["#D55E00", 3]]) {
        context.strokeStyle = colour;
        context.lineWidth = width;
        context.strokeRect(column * patch, row * tall, patch, tall);
      }
      const enlarged = zoom.getContext("2d");
      enlarged.imageSmoothingEnabled = false;
      enlarged.drawImage(image, column * size.patch, row * size.patch, size.patch, size.patch, 0, 0, 96, 96);
    }

    function select(next, tell) {
      index = next;
      const column = index % size.columns, row = Math.floor(index / size.columns), p = size.patch;
      mark.style.top = `${index / size.tokens * high - 1}px`;
      mark.style.height = `${Math.max(4, high / size.tokens + 2)}px`;
      pixels(strip, 1, payload.columns, i => cividis(size.values[index * payload.columns + i] / 255));
      status.textContent = `Patch ${index}: row ${row}, column ${column}; pixels x ${column * p} to ${column * p + p - 1}, ` +
        `y ${row * p} to ${row * p + p - 1}. It becomes token ${index}: ${size.numbers} numbers (${p} × ${p} × 3).`;
      picture.dataset.selected = index;
      paint();
      if (tell) report({patch_size: p, patch: index, row, column});
    }

    function resize(patch, tell) {
      size = payload.sizes.find(candidate => candidate.patch === patch);
      size.values = size.values || bytes(size.matrix);
      pixels(table, size.tokens, payload.columns, i => cividis(size.values[i] / 255));
      table.setAttribute("aria-label", `token matrix: ${size.tokens} rows of ${size.numbers} numbers`);
      count.textContent = `${size.rows} × ${size.columns} = ${size.tokens} tokens of ${size.numbers} numbers`;
      select(Math.min(index, size.tokens - 1), tell);
    }

    const at = event => {
      const box = picture.getBoundingClientRect();
      const column = clamp(Math.floor((event.clientX - box.left) / box.width * size.columns), 0, size.columns - 1);
      return clamp(Math.floor((event.clientY - box.top) / box.height * size.rows), 0, size.rows - 1) * size.columns + column;
    };
    const rowAt = event => {
      const box = table.getBoundingClientRect();
      return clamp(Math.floor((event.clientY - box.top) / box.height * size.tokens), 0, size.tokens - 1);
    };
    picture.addEventListener("pointermove", event => select(at(event), false));
    picture.addEventListener("click", event => select(at(event), true));
    table.addEventListener("pointermove", event => select(rowAt(event), false));
    table.addEventListener("click", event => select(rowAt(event), true));
    picture.addEventListener("keydown", event => {
      const next = moved(event.key, index, size.columns, size.tokens);
      if (next === null) return;
      event.preventDefault();
      event.stopPropagation();
      select(next, true);
    });

    const sizes = payload.sizes.map(candidate => candidate.patch);
    const chooser = choice("patch size", sizes, payload.start, patch => resize(patch, true));
    root.append(chooser, element("div", {class: "row"},
      element("div", {}, picture),
      element("div", {}, element("div", {style: "position:relative"}, table, mark))),
      element("div", {class: "row", style: "margin-top:8px"}, zoom, element("div", {style: "flex:1;min-width:300px"}, count, strip, status)),
      element("div", {class: "hint"}, "Point at a patch or at a row of the matrix; or focus the image and use the arrow keys."));
    image.onload = paint;
    image.src = payload.image;
    resize(payload.start, false);
    return value => {
      if (!sizes.includes(value.patch_size)) return;
      root.querySelector(`input[value="${value.patch_size}"]`).checked = true;
      index = clamp(value.patch, 0, Infinity);
      resize(value.patch_size, false);
    };
  };

  /* ---- tokens and their roles ---- */

  draw.token_strip = (root, payload, report) => {
    let index = payload.start;
    const boxes = payload.tokens.map((token, i) => element("div", {class: "token", role: "option", id: `token-${i}`, "data-index": i,
      "aria-label": `${i}: ${token.text}, ${token.role}`, onclick: () => { list.focus(); select(i, true); },
      style: `background:${payload.colors[token.role] || "#fff"}99;border-bottom-color:${token.label === null ? "#9ca3af" : payload.colors.label}`},
      token.text));
    const list = element("div", {class: "tokens", role: "listbox", tabindex: 0, "aria-label": payload.title + ": tokens; arrow keys move"});
    boxes.forEach((box, i) => {
      const before = payload.tokens[i - 1];
      if (before && before.segment !== payload.tokens[i].segment) list.append(element("div", {class: "segment", role: "presentation"}));
      list.append(box);
    });
    const facts = element("table", {"data-part": "facts"}), status = element("div", {class: "status", role: "status", "aria-live": "polite"});

    function attended(i) {
      const mask = new Array(boxes.length).fill(false);
      for (const [start, stop] of payload.attends[i]) mask.fill(true, start, stop);
      return mask;
    }

    function select(next, tell) {
      boxes[index].setAttribute("aria-selected", "false");
      index = next;
      const token = payload.tokens[index], mask = attended(index), seen = mask.filter(Boolean).length;
      boxes.forEach((box, i) => box.classList.toggle("far", !mask[i]));
      boxes[index].setAttribute("aria-selected", "true");
      list.setAttribute("aria-activedescendant", `token-${index}`);
      list.dataset.selected = index;
      const rows = [["position in row", index], ["position in sample", token.position], ["token", token.text], ["id", token.id], ["role", token.role],
        ["label", token.label === null ? "−100: not learned" : `${token.label}: learned`],
        ["sample", token.segment || "none (padding)"], ["may look at", `${seen} of ${boxes.length} tokens (the others are pale)`]];
      facts.replaceChildren(...rows.filter(([, value]) => value !== null)
        .map(([name, value]) => element("tr", {}, element("th", {scope: "row"}, name), element("td", {}, String(value)))));
      status.textContent = `Token ${index}, ${token.text}: ${token.role}, ` +
        `${token.label === null ? "not learned" : "learned"}, may look at ${seen} of ${boxes.length} tokens.`;
      if (tell) report({token: index, role: token.role});
    }

    function group(step) {
      let next = index;
      const same = i => payload.tokens[i].role === payload.tokens[index].role && payload.tokens[i].segment === payload.tokens[index].segment;
      while (next + step >= 0 && next + step < boxes.length) { next += step; if (!same(next)) break; }
      return next;
    }
    list.addEventListener("keydown", event => {
      const next = event.key === "ArrowDown" ? group(1) : event.key === "ArrowUp" ? group(-1) : moved(event.key, index, boxes.length, boxes.length);
      if (next === null) return;
      event.preventDefault();
      event.stopPropagation();
      select(next, true);
    });

    const keys = payload.counts.map(([role, count]) => element("span", {class: "key"},
      element("span", {class: "swatch", style: `background:${payload.colors[role] || "#fff"}99`}), `${role} ${count}`));
    keys.push(element("span", {class: "key"}, element("span", {class: "swatch line", style: `background:${payload.colors.label}`}), `label (learned) ${payload.learned}`));
    root.append(element("div", {"data-part": "counts"}, ...keys), list, facts, status,
      element("div", {class: "hint"}, "Click a token, or focus the strip: ← → step, ↑ ↓ jump to the next role, Home and End."));
    select(index, false);
    return value => { if (value.token in boxes) select(value.token, false); };
  };

  /* ---- pictures drawn ahead, one for each value of a control ---- */

  draw.flip_book = (root, payload, report) => {
    const picture = element("img", {class: "frame", alt: ""});
    const shown = element("output", {"data-part": "value"});
    const slider = element("input", {type: "range", min: 0, max: payload.frames.length - 1, step: 1, "aria-label": payload.name,
      oninput: () => show(Number(slider.value), true)});
    function show(next, tell) {
      const frame = payload.frames[next];
      slider.value = next;
      slider.setAttribute("aria-valuetext", frame.value);
      picture.src = frame.image;
      picture.alt = `${payload.title}, ${payload.name} ${frame.value}`;
      shown.textContent = ` ${payload.name} = ${frame.value}`;
      if (tell) report({[payload.name]: frame.value, index: next});
    }
    root.append(element("div", {}, slider, shown), picture);
    show(payload.start, false);
    return value => { if (value.index in payload.frames) show(value.index, false); };
  };

  /* ---- a change of a weight matrix, cut to a rank ---- */

  draw.lora_rank = (root, payload, report) => {
    const side = 300, scale = Math.min(side / payload.width, side / payload.height);
    const matrix = element("canvas", {role: "img", "data-part": "matrix",
      style: `width:${Math.round(payload.width * scale)}px;height:${Math.round(payload.height * scale)}px`});
    const bars = element("canvas", {width: 380, height: 200, role: "img", "data-part": "spectrum"});
    const facts = element("table", {"data-part": "facts"}), status = element("div", {class: "status", role: "status", "aria-live": "polite"});
    const shown = element("output", {"data-part": "value"});
    const slider = element("input", {type: "range", min: 0, max: payload.ranks.length - 1, step: 1, "aria-label": "rank",
      oninput: () => show(Number(slider.value), true)});
    const whole = payload.out * payload.in, percent = share => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
    const spelled = number => number.toLocaleString("en-US");

    function spectrum(rank) {
      const context = bars.getContext("2d"), count = payload.singular.length, wide = bars.width / count;
      context.clearRect(0, 0, bars.width, bars.height);
      payload.singular.forEach((value, i) => {
        const high = Math.max(1, value / (payload.singular[0] || 1) * (bars.height - 4));
        context.fillStyle = i < rank ? "#E69F00" : "#9ca3af";
        context.fillRect(i * wide, bars.height - high, Math.max(1, wide - (wide > 3 ? 1 : 0)), high);
      });
      bars.setAttribute("aria-label", `${count} singular values, the first ${rank} kept`);
    }

    function show(index, tell) {
      const entry = payload.ranks[index], values = bytes(entry.matrix);
      slider.value = index;
      slider.setAttribute("aria-valuetext", `rank ${entry.rank}`);
      shown.textContent = ` rank ${entry.rank}`;
      pixels(matrix, payload.height, payload.width, i => cividis(values[i] / 255));
      matrix.setAttribute("aria-label", `the change cut to rank ${entry.rank}: its first ${payload.height} rows and ${payload.width} columns`);
      spectrum(entry.rank);
      const rows = [["rank", entry.rank], ["numbers to learn", `${spelled(entry.numbers)} of ${spelled(whole)} (${percent(entry.numbers / whole)})`],
        ["with Adam, fp32", `${spelled(16 * entry.numbers)} bytes instead of ${spelled(16 * whole)}`],
        ["squared change kept", percent(entry.kept)], ["loss", entry.loss === null ? null : entry.loss.toFixed(4)]];
      facts.replaceChildren(...rows.filter(([, value]) => value !== null)
        .map(([name, value]) => element("tr", {}, element("th", {scope: "row"}, name), element("td", {}, String(value)))));
      status.textContent = `Rank ${entry.rank} keeps ${percent(entry.kept)} of the squared change` +
        (entry.loss === null ? "." : `; the loss is ${entry.loss.toFixed(4)}.`);
      root.dataset.rank = entry.rank;
      if (tell) report({rank: entry.rank});
    }

    root.append(element("div", {}, slider, shown), element("div", {class: "row"}, element("div", {}, matrix), element("div", {}, bars, facts)), status,
      element("div", {class: "hint"}, "Left: the first rows and columns of the change. Right: its singular values, orange those that rank r keeps. Arrow keys move the slider."));
    show(payload.start, false);
    return value => {
      const index = payload.ranks.findIndex(entry => entry.rank === value.rank);
      if (index >= 0) show(index, false);
    };
  };

  /* ---- a query cell, its window on every encoder's grid, and whom it believes ---- */

  draw.windows = (root, payload, report) => {
    const shown = 232, small = 168, cells = payload.queries * payload.queries;
    let index = payload.start;
    const image = new Image();
    const percent = share => `${(100 * share).toFixed(0)} %`;
    const picture = element("canvas", {width: shown, height: shown, tabindex: 0, role: "application", "data-part": "queries",
      "aria-label": payload.title + ": query cells; arrow keys move, Home and End jump"});
    const status = element("div", {class: "status", role: "status", "aria-live": "polite"});
    const towers = payload.towers.map(tower => ({...tower, values: bytes(tower.weights), canvas: element("canvas", {width: small, height: small, role: "img"}),
      bar: element("div", {style: "height:10px;background:#0072B2"}), text: element("div", {"data-part": "share"})}));

    function outline(context, x, y, side) {
      for (const [colour, width] of [["#fff", 5], ["#D55E00", 2.5]]) {
        context.strokeStyle = colour;
        context.lineWidth = width;
        context.strokeRect(x, y, side, side);
      }
    }

    function lines(context, size, count) {
      context.strokeStyle = "rgba(255,255,255,.6)";
      context.lineWidth = 1;
      context.beginPath();
      for (let i = 1; i < count; i++) {
        context.moveTo(i * size / count, 0); context.lineTo(i * size / count, size);
        context.moveTo(0, i * size / count); context.lineTo(size, i * size / count);
      }
      context.stroke();
    }

    function paint() {
      const row = Math.floor(index / payload.queries), column = index % payload.queries, context = picture.getContext("2d");
      context.drawImage(image, 0, 0, shown, shown);
      lines(context, shown, payload.queries);
      outline(context, column * shown / payload.queries, row * shown / payload.queries, shown / payload.queries);
      for (const tower of towers) {
        const own = tower.canvas.getContext("2d"), step = small / tower.side, count = tower.window * tower.window;
        const weights = tower.values.subarray(index * count, (index + 1) * count), top = Math.max(1, ...weights);
        own.drawImage(image, 0, 0, small, small);
        own.fillStyle = "rgba(255,255,255,.55)";
        own.fillRect(0, 0, small, small);
        weights.forEach((weight, i) => {
          const x = column * tower.window + i % tower.window, y = row * tower.window + Math.floor(i / tower.window);
          own.fillStyle = `rgb(${cividis(weight / top)})`;
          own.fillRect(x * step, y * step, step, step);
        });
        if (tower.side <= 32) lines(own, small, tower.side);
        outline(own, column * tower.window * step, row * tower.window * step, tower.window * step);
      }
    }

    function select(next, tell) {
      index = clamp(next, 0, cells - 1);
      const row = Math.floor(index / payload.queries), column = index % payload.queries;
      const parts = towers.map(tower => {
        const share = tower.shares[index];
        tower.bar.style.width = `${100 * share}%`;
        tower.text.textContent = percent(share);
        tower.canvas.setAttribute("aria-label", `${tower.name}: a window of ${tower.window} × ${tower.window} tokens of its ${tower.side} × ${tower.side}, weight ${percent(share)}`);
        return `${tower.name} ${percent(share)}`;
      });
      status.textContent = `Query ${index} (row ${row}, column ${column}) believes: ${parts.join(", ")}.`;
      picture.dataset.selected = index;
      paint();
      if (tell) report({query: index, row, column});
    }

    const at = event => {
      const box = picture.getBoundingClientRect(), side = payload.queries;
      const place = (value, from, length) => clamp(Math.floor((value - from) / length * side), 0, side - 1);
      return place(event.clientY, box.top, box.height) * side + place(event.clientX, box.left, box.width);
    };
    picture.addEventListener("pointermove", event => select(at(event), false));
    picture.addEventListener("click", event => select(at(event), true));
    picture.addEventListener("keydown", event => {
      const next = moved(event.key, index, payload.queries, cells);
      if (next === null) return;
      event.preventDefault();
      event.stopPropagation();
      select(next, true);
    });
    root.append(element("div", {class: "row"}, element("div", {}, element("div", {}, `${payload.queries} × ${payload.queries} queries`), picture),
      ...towers.map(tower => element("div", {style: `width:${small}px`}, element("div", {}, `${tower.name}: ${tower.side} × ${tower.side}`), tower.canvas,
        element("div", {style: "background:#e5e7eb;margin-top:4px"}, tower.bar), tower.text))), status,
      element("div", {class: "hint"}, "Point at a query, or focus the left picture and use the arrow keys. Yellow tokens have the most weight within their window; bars compare the encoders."));
    image.onload = paint;
    image.src = payload.image;
    select(index, false);
    return value => select(value.query, false);
  };

  /* ---- settings to choose, and the facts that follow ---- */

  draw.settings = (root, payload, report) => {
    const chosen = [...payload.start];
    const table = element("table", {"data-part": "facts"}), status = element("div", {class: "status", role: "status", "aria-live": "polite"});

    function show(tell) {
      const entry = payload.entries[chosen.join(",")], names = payload.controls.map(([name, options], i) => `${name} ${options[chosen[i]]}`);
      const rows = entry.facts.map(([name, text, share]) => element("tr", {}, element("th", {scope: "row"}, name),
        element("td", {style: "text-align:right"}, text), element("td", {}, share === null ? "" :
          element("div", {style: `width:${Math.max(1, Math.round(260 * share))}px;height:12px;background:#0072B2`}))));
      table.replaceChildren(...rows);
      status.textContent = `${names.join(", ")}: ` + (entry.refused || entry.facts.map(([name, text]) => `${name} ${text}`).join("; "));
      root.dataset.chosen = chosen.join(",");
      if (tell) report(Object.fromEntries(payload.controls.map(([name, options], i) => [name, options[chosen[i]]])));
    }

    payload.controls.forEach(([name, options], i) => root.append(choice(name, options, options[chosen[i]], option => {
      chosen[i] = options.indexOf(option);
      show(true);
    })));
    root.append(table, status, element("div", {class: "hint"}, "A bar compares with the largest value that these settings can reach. Tab goes from setting to setting, the arrow keys choose."));
    show(false);
    return value => {
      payload.controls.forEach(([name, options], i) => {
        const found = options.indexOf(value[name]);
        if (found < 0) return;
        chosen[i] = found;
        root.querySelectorAll("fieldset")[i].querySelectorAll("input")[found].checked = true;
      });
      show(false);
    };
  };

  /* ---- a picture as words of a codebook: look at one, see its neighbours, put another in its place ---- */

  draw.codebook = (root, payload, report) => {
    const shown = 288, cell = shown / payload.columns, count = payload.codes.length;
    let place = payload.start, codes = [...payload.codes], pasted = [];
    const image = new Image(), tiles = new Image();
    const picture = element("canvas", {width: shown, height: Math.round(cell * payload.rows), tabindex: 0, role: "application", "data-part": "picture",
      "aria-label": payload.title + ": words of the picture; arrow keys move, Enter goes to the neighbours, Delete takes edits back"});
    const near = element("div", {class: "tokens", role: "listbox", tabindex: 0, "aria-label": "the nearest words of the codebook; arrow keys move, Enter puts one in"});
    const status = element("div", {class: "status", role: "status", "aria-live": "polite"});
    const any = element("input", {type: "number", min: 0, max: payload.count - 1, "aria-label": "any word of the codebook", style: "width:6em"});
    const back = element("button", {type: "button", onclick: () => undo()}, "take edits back");
    const grid = element("div", {"data-part": "codes", style: "font:12px ui-monospace,monospace;white-space:pre"});
    let offered = [], option = 0;

    function tile(code, size) {
      const made = element("canvas", {width: size, height: size, role: "img", "aria-label": `word ${code}`});
      const across = payload.across, side = payload.side;
      if (tiles.complete && tiles.naturalWidth) {
        const context = made.getContext("2d");
        context.imageSmoothingEnabled = false;
        context.drawImage(tiles, code % across * side, Math.floor(code / across) * side, side, side, 0, 0, size, size);
      }
      return made;
    }

    function paint() {
      const context = picture.getContext("2d"), scale = shown / payload.width;
      context.imageSmoothingEnabled = false;
      context.drawImage(image, 0, 0, picture.width, picture.height);
      for (const {box: [left, top, width, height], crop} of pasted) {
        if (crop.complete) context.drawImage(crop, left * scale, top * scale, width * scale, height * scale);
      }
      const row = Math.floor(place / payload.columns), column = place % payload.columns;
      for (const [colour, width] of [["#fff", 6], ["#D55E00", 3]]) {
        context.strokeStyle = colour;
        context.lineWidth = width;
        context.strokeRect(column * cell, row * cell, cell, cell);
      }
    }

    function list() {
      offered = payload.neighbours[codes[place]].filter(code => code !== codes[place]);
      option = clamp(option, 0, offered.length - 1);
      near.replaceChildren(...offered.map((code, i) => element("div", {class: "token", role: "option", id: `near-${i}`, "data-code": code,
        "aria-selected": i === option ? "true" : "false", onclick: () => put(code)}, tile(code, 40), element("div", {}, String(code)))));
      near.setAttribute("aria-activedescendant", `near-${option}`);
      grid.textContent = Array.from({length: payload.rows}, (_, row) => codes.slice(row * payload.columns, (row + 1) * payload.columns)
        .map((code, column) => (row * payload.columns + column === place ? `[${code}]` : `${code} `).padStart(6)).join("")).join("\n");
    }

    function select(next, tell) {
      place = next;
      picture.dataset.selected = place;
      const changed = codes[place] !== payload.codes[place] ? `, put in for ${payload.codes[place]}` : "";
      status.textContent = `Place ${place}: row ${Math.floor(place / payload.columns)}, column ${place % payload.columns}. Word ${codes[place]}${changed}, ` +
        `${codes.filter(code => code === codes[place]).length} of ${count} words of this picture are the same.`;
      list();
      paint();
      if (tell) report({place, code: codes[place], codes});
    }

    function put(code) {
      if (!(code >= 0 && code < payload.count)) return;
      codes = codes.map((old, i) => i === place ? code : old);
      const known = payload.redrawn[`${place},${code}`];
      const crop = new Image(), box = payload.boxes[place];
      if (known || !payload.live) {
        crop.onload = paint;
        crop.src = known || tile(code, payload.side).toDataURL();
        const side = payload.width / payload.columns;
        pasted.push({box: known ? box : [place % payload.columns * side, Math.floor(place / payload.columns) * side, side, side], crop});
      }
      select(place, true);
      status.textContent += known ? " Painted by the decoder." : payload.live ? " Python paints it." : " Shown alone: its neighbours were not painted anew.";
    }

    function undo() {
      codes = [...payload.codes];
      pasted = [];
      image.src = payload.image;
      select(place, true);
    }

    picture.addEventListener("click", event => {
      const area = picture.getBoundingClientRect();
      select(clamp(Math.floor((event.clientY - area.top) / area.height * payload.rows), 0, payload.rows - 1) * payload.columns +
        clamp(Math.floor((event.clientX - area.left) / area.width * payload.columns), 0, payload.columns - 1), true);
    });
    picture.addEventListener("keydown", event => {
      const next = moved(event.key, place, payload.columns, count);
      if (next === null && event.key !== "Enter" && event.key !== "Delete") return;
      event.preventDefault();
      event.stopPropagation();
      if (event.key === "Enter") near.focus(); else if (event.key === "Delete") undo(); else select(next, true);
    });
    near.addEventListener("keydown", event => {
      const next = moved(event.key, option, offered.length, offered.length);
      if (next === null && event.key !== "Enter" && event.key !== "Escape") return;
      event.preventDefault();
      event.stopPropagation();
      if (event.key === "Enter") put(offered[option]); else if (event.key === "Escape") picture.focus(); else { option = next; list(); }
    });
    any.addEventListener("change", () => put(Number(any.value)));
    root.append(element("div", {class: "row"}, element("div", {}, picture), element("div", {style: "flex:1;min-width:300px"}, element("div", {}, "nearest words"), near,
      element("div", {}, element("label", {}, "any word ", any), " ", back), grid)), status,
      element("div", {class: "hint"}, "Click a word, or focus the picture: arrow keys, Enter for its neighbours, Enter again puts one in, Escape goes back."));
    image.onload = paint;
    tiles.onload = () => { list(); };
    tiles.src = payload.tiles;
    image.src = payload.image;
    select(place, false);
    const show = value => {
      if (value.codes && value.codes.length === count) codes = [...value.codes];
      if (value.place in codes) select(value.place, false);
    };
    show.answer = found => { pasted = []; image.src = found.image; };
    return show;
  };

  /* ---- pictures in an order: a sentence, its words, and the picture that comes next ---- */

  draw.composer = (root, payload, report) => {
    let order = [...payload.start], chosen = order.length - 1, dragged = null;
    const card = (index, extra) => element("div", {class: "token", ...extra}, element("img", {src: payload.pictures[index].image, alt: "", width: 72, height: 72, draggable: "false",
      style: "display:block;image-rendering:pixelated"}), payload.pictures[index].name);
    const shelf = element("div", {class: "tokens", role: "toolbar", "aria-label": "pictures to choose from"});
    const list = element("div", {class: "tokens", role: "listbox", tabindex: 0, style: "min-height:100px;border:1px dashed #6b7280", "data-part": "sentence",
      "aria-label": "the sentence; arrow keys choose, with Shift they move the picture, Delete takes it out"});
    const words = element("div", {"data-part": "words", style: "font:12px/1.5 ui-monospace,monospace;overflow-wrap:anywhere"});
    const next = element("div", {"data-part": "next"}), status = element("div", {class: "status", role: "status", "aria-live": "polite"});

    function show(tell) {
      chosen = clamp(chosen, 0, Math.max(0, order.length - 1));
      list.replaceChildren(...order.map((index, at) => card(index, {role: "option", id: `at-${at}`, draggable: "true", "data-at": at,
        "aria-selected": at === chosen ? "true" : "false", "aria-label": `${at + 1} of ${order.length}: ${payload.pictures[index].name}`,
        onclick: () => { chosen = at; list.focus(); show(true); },
        ondragstart: event => { dragged = {from: at}; event.dataTransfer.setData("text/plain", String(index)); }})));
      list.setAttribute("aria-activedescendant", order.length ? `at-${chosen}` : "");
      list.dataset.order = order.join(",");
      const short = tokens => `${tokens.slice(0, 4).join(" ")} … ${tokens.slice(-1)[0]}`;
      const total = payload.begin.length + order.reduce((sum, index) => sum + payload.pictures[index].words.length, 0);
      words.textContent = [payload.begin.join(" "), ...order.map(index => short(payload.pictures[index].words))].filter(Boolean).join(" | ") + ` | ?   (${total} words)`;
      const known = payload.answers[order.join(",")];
      next.replaceChildren(known ? element("img", {src: known, alt: "the picture that the model writes next", width: 108, height: 108, style: "image-rendering:pixelated;outline:3px solid #D55E00"})
        : element("span", {class: "hint"}, payload.live ? "asking the model …" : "This order was not sampled ahead; run the notebook and call live() to sample any."));
      const names = order.map(index => payload.pictures[index].name).join(", ");
      status.textContent = `Sentence of ${order.length}: ${names || "nothing yet"}. ${known ? "The model's next picture is shown." : ""}`;
      if (tell) report({order, chosen});
    }

    function change(next, at) { order = next; chosen = at; show(true); }
    const without = at => order.filter((_, i) => i !== at);
    function shift(from, to) {
      if (to < 0 || to >= order.length) return;
      const rest = without(from);
      rest.splice(to, 0, order[from]);
      change(rest, to);
    }
    payload.pictures.forEach((picture, index) => shelf.append(element("button", {type: "button", draggable: "true", "data-index": index, style: "padding:0;border:0;background:none",
      "aria-label": `put ${picture.name} at the end`, onclick: () => change([...order, index], order.length),
      ondragstart: event => { dragged = {index}; event.dataTransfer.setData("text/plain", String(index)); }}, card(index, {}))));
    list.addEventListener("dragover", event => event.preventDefault());
    list.addEventListener("drop", event => {
      event.preventDefault();
      const target = event.composedPath().find(node => node.dataset && node.dataset.at !== undefined);
      const to = target ? Number(target.dataset.at) : order.length;
      if (dragged === null) return;
      if (dragged.index !== undefined) change([...order.slice(0, to), dragged.index, ...order.slice(to)], to);
      else shift(dragged.from, Math.min(to, order.length - 1));
      dragged = null;
    });
    list.addEventListener("keydown", event => {
      const to = moved(event.key, chosen, order.length, order.length), out = event.key === "Delete" || event.key === "Backspace";
      if ((to === null && !out) || !order.length) return;
      event.preventDefault();
      event.stopPropagation();
      if (out) change(without(chosen), chosen); else if (event.shiftKey) shift(chosen, to); else { chosen = to; show(true); }
    });
    root.append(element("div", {}, "pictures: click or drag one into the sentence"), shelf, element("div", {}, "sentence"), list, words,
      element("div", {class: "row", style: "margin-top:8px"}, element("div", {}, "next: "), next), status,
      element("div", {class: "hint"}, "In the sentence: arrow keys choose a picture, Shift and an arrow key move it, Delete takes it out."));
    show(false);
    const given = value => { if (Array.isArray(value.order) && value.order.every(index => index in payload.pictures)) { order = [...value.order]; chosen = value.chosen || 0; show(false); } };
    given.answer = found => { payload.answers[found.order] = found.image; if (found.order === order.join(",")) show(false); };
    return given;
  };

  /* ---- the two ways in ---- */

  /* A notebook has shortcuts of one letter (d d deletes a cell), and arrows move through its cells. What is typed inside a
     widget stays there; combined keys such as Shift+Enter, Tab and Escape still reach the notebook. */
  function keep(event) {
    const combined = event.ctrlKey || event.metaKey || event.altKey || (event.shiftKey && event.key === "Enter");
    if (!combined && event.key !== "Tab" && event.key !== "Escape") event.stopPropagation();
  }

  function mount(host, payload, report) {
    const shadow = host.shadowRoot || host.attachShadow({mode: "open"});  // the page's styles stay out, the fallback picture is hidden
    const root = element("div", {class: "widget", role: "group", "aria-label": payload.title});
    root.addEventListener("keydown", keep);
    shadow.replaceChildren(element("style", {}, STYLE), root);
    root.append(element("p", {class: "title"}, payload.title));
    return draw[payload.kind](root, payload, report) || (() => {});
  }

  function start(identifier, payload) {
    for (const host of document.querySelectorAll(`[data-mllm-widget="${identifier}"]`)) {
      if (!host.shadowRoot) mount(host, payload, value => { host.dataset.value = JSON.stringify(value); });
    }
  }

  function live({model, el}) {
    const host = document.createElement("div");
    el.append(host);
    const show = mount(host, model.get("payload"), value => { model.set("value", value); model.save_changes(); });
    model.on("change:value", () => show(model.get("value")));
    model.on("change:answer", () => show.answer && show.answer(model.get("answer")));   // Python's reply to a value
  }

  return {start, live, kinds: Object.keys(draw)};
})();
