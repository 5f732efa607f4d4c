"use strict";
(function () {
  // ---- tables: a click on a heading sorts, empty cells last
  document.querySelectorAll("table.sortable").forEach(function (table) {
    const heads = Array.from(table.tHead.rows[0].cells);
    heads.forEach(function (head, column) {
      head.querySelector("button").addEventListener("click", function () {
        const up = head.getAttribute("aria-sort") !== "ascending";
        heads.forEach(function (other) { other.setAttribute("aria-sort", "none"); });
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const rows = Array.from(table.tBodies[0].rows).map(function (row, place) { return { row: row, place: place, key: row.cells[column].dataset.key }; });
        rows.sort(function (a, b) {
          if (a.key === undefined || b.key === undefined) return a.key === b.key ? a.place - b.place : a.key === undefined ? 1 : -1;
          const x = Number(a.key), y = Number(b.key);
          const order = Number.isNaN(x) || Number.isNaN(y) ? a.key.localeCompare(b.key) : x - y;
          return (up ? order : -order) || a.place - b.place;
        });
        rows.forEach(function (item) { table.tBodies[0].appendChild(item.row); });
      });
    });
  });
  document.querySelectorAll("[data-switch]").forEach(function (select) {
    select.addEventListener("change", function () {
      document.querySelectorAll('[data-group="' + select.dataset.switch + '"]').forEach(function (part) { part.hidden = part.dataset.value !== select.value; });
    });
  });
  document.querySelectorAll("[data-filter]").forEach(function (select) {
    select.addEventListener("change", function () {
      document.getElementById(select.dataset.filter).querySelectorAll("tbody tr").forEach(function (row) {
        row.hidden = select.value !== "" && !Array.from(row.cells).some(function (cell) { return cell.dataset.key === select.value; });
      });
    });
  });

  // ---- browser of all images
  const data = JSON.parse(document.getElementById("data").textContent);
  if (!data.images) return;
  const $ = function (id) { return document.getElementById(id); };
  const PAGE = 24;
  let shown = PAGE;
  const bytes = function (text) { return Uint8Array.from(atob(text), function (c) { return c.charCodeAt(0); }); };
  const colours = { positive: bytes(data.colours.positive), signed: bytes(data.colours.signed) };
  const option = function (select, value, text) { const o = document.createElement("option"); o.value = value; o.textContent = text; select.appendChild(o); };
  data.explainers.forEach(function (e, i) { option($("b-explainer"), i, e.title); });
  data.metrics.forEach(function (m, i) { option($("b-metric"), i, (m.title + " " + m.arrow).trim()); });
  data.images = data.images.map(function (row, place) {
    const name = function (k) { return k === null ? null : data.classes[k]; };
    return { place: place, id: row[0], label: name(row[1]), predicted: name(row[2]), p: row[3], maps: data.maps[place] || data.explainers.map(function () { return null; }), pixels: data.pixels[place] || null };
  });
  const columns = new Map();
  function scoreOf(item, e, m) {
    const key = e + "," + m;
    if (!columns.has(key)) columns.set(key, new DataView(bytes(data.scores[e][m]).buffer));
    const value = columns.get(key).getFloat32(4 * item.place, true);
    return Number.isNaN(value) ? null : Number(value.toPrecision(7));
  }
  const names = function (key) { return Array.from(new Set(data.images.map(function (i) { return i[key]; }).filter(function (v) { return v !== null; }))).sort(); };
  names("label").forEach(function (v) { option($("b-label"), v, v); });
  names("predicted").forEach(function (v) { option($("b-predicted"), v, v); });

  const pixels = new Map();
  function loadPixels(item) {
    if (!pixels.has(item.id)) {
      pixels.set(item.id, item.pixels === null ? Promise.resolve(null) : new Promise(function (resolve) {
        const image = new Image();
        image.onload = function () { resolve(image); };
        image.onerror = function () { resolve(null); };
        image.src = item.pixels;
      }));
    }
    return pixels.get(item.id);
  }
  function sample(values, rows, columns, nearest, signed, y, x, height, width) {
    if (nearest) {
      const row = Math.min(Math.floor((y + 0.5) * rows / height), rows - 1), column = Math.min(Math.floor((x + 0.5) * columns / width), columns - 1);
      return signed ? (values[row * columns + column] - 128) / 127 : values[row * columns + column] / 255;
    }
    // half-pixel centres, clamped at the border: as the maps are upsampled for scoring
    const fy = Math.min(Math.max((y + 0.5) * rows / height - 0.5, 0), rows - 1), fx = Math.min(Math.max((x + 0.5) * columns / width - 0.5, 0), columns - 1);
    const y0 = Math.min(Math.floor(fy), Math.max(rows - 2, 0)), x0 = Math.min(Math.floor(fx), Math.max(columns - 2, 0));
    const y1 = Math.min(y0 + 1, rows - 1), x1 = Math.min(x0 + 1, columns - 1), ty = fy - y0, tx = fx - x0;
    const v = (values[y0 * columns + x0] * (1 - tx) + values[y0 * columns + x1] * tx) * (1 - ty) + (values[y1 * columns + x0] * (1 - tx) + values[y1 * columns + x1] * tx) * ty;
    return signed ? (v - 128) / 127 : v / 255;
  }
  function draw(canvas, image, map, explainer, side) {
    const width = image ? image.naturalWidth : side, height = image ? image.naturalHeight : side;
    canvas.width = width; canvas.height = height;
    const context = canvas.getContext("2d");
    if (image) context.drawImage(image, 0, 0); else { context.fillStyle = "#1f1f1f"; context.fillRect(0, 0, width, height); }
    if (!map) return;
    const signed = explainer.signed, rows = map[0], columns = map[1], values = bytes(map[2]), lut = signed ? colours.signed : colours.positive;
    const strongest = Number($("b-opacity").value) * data.opacity.max, frame = context.getImageData(0, 0, width, height), p = frame.data;
    for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
      const v = sample(values, rows, columns, explainer.nearest, signed, y, x, height, width);
      const c = 3 * Math.round(255 * Math.min(Math.max(signed ? (v + 1) / 2 : v, 0), 1));
      const a = strongest * Math.pow(Math.min(Math.abs(signed ? v : Math.max(v, 0)), 1), data.opacity.power), o = 4 * (y * width + x);
      for (let k = 0; k < 3; k++) p[o + k] = p[o + k] * (1 - a) + lut[c + k] * a;
    }
    context.putImageData(frame, 0, 0);
  }
  function paint(canvas, item, e, side) { loadPixels(item).then(function (image) { draw(canvas, image, e === null ? null : item.maps[e], e === null ? null : data.explainers[e], side); }); }
  function number(value, m) {
    if (value === null) return "not scored";
    const digits = data.metrics[m].digits, text = value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
    return (/[1-9]/.test(text) ? text : text.replace("-", "")).replace("-", "−");
  }
  function element(name, text, parent, look) { const e = document.createElement(name); if (text) e.textContent = text; if (look) e.className = look; parent.appendChild(e); return e; }
  const outcome = function (item) { return item.label === null || item.predicted === null ? "" : item.label === item.predicted ? "correct" : "wrong"; };
  const said = function (item) { return [outcome(item) === "" ? "" : outcome(item) === "correct" ? "✓ " : "✗ ", item.predicted === null ? "" : "predicted " + item.predicted, item.p === null ? "" : (item.predicted === null ? "" : ", ") + "p = " + item.p.toFixed(2)].join(""); };

  function chosen() {
    const e = Number($("b-explainer").value), m = Number($("b-metric").value), order = $("b-order").value;
    const low = $("b-low").value, high = $("b-high").value, text = $("b-text").value.toLowerCase();
    const score = function (item) { return scoreOf(item, e, m); };
    const found = data.images.filter(function (item) {
      const s = score(item);
      item.score = s;
      return (!$("b-label").value || item.label === $("b-label").value) && (!$("b-predicted").value || item.predicted === $("b-predicted").value) &&
        (!$("b-outcome").value || outcome(item) === $("b-outcome").value) && (low === "" || (s !== null && s >= Number(low))) &&
        (high === "" || (s !== null && s <= Number(high))) && item.id.toLowerCase().includes(text);
    });
    const sign = (data.metrics[m].sign || 1) * (order === "worst" ? -1 : 1);
    found.sort(function (a, b) {
      const x = a.score, y = b.score;
      if (order !== "name" && x !== y) return x === null ? 1 : y === null ? -1 : sign * (y - x);
      return a.id < b.id ? -1 : a.id > b.id ? 1 : 0;
    });
    return found;
  }
  function render() {
    const e = Number($("b-explainer").value), m = Number($("b-metric").value), found = chosen(), cards = $("b-cards");
    cards.replaceChildren();
    found.slice(0, shown).forEach(function (item) {
      const card = element("button", "", cards, "card");
      card.type = "button"; card.dataset.id = item.id;
      const canvas = element("canvas", "", card);
      canvas.setAttribute("role", "img"); canvas.setAttribute("aria-label", data.explainers[e].title + " on " + item.id);
      paint(canvas, item, e, 160);
      element("b", number(scoreOf(item, e, m), m), card).title = data.metrics[m].title;
      element("span", item.label === null ? "no label" : item.label, card);
      element("span", said(item), card, outcome(item) === "wrong" ? "wrong" : "").title = said(item);
      element("span", item.id, card).title = item.id;
      card.addEventListener("click", function () { open(item); });
    });
    $("b-count").textContent = found.length + " of " + data.images.length + " images" + (found.length > shown ? ", the first " + shown + " shown" : "");
    $("b-more").hidden = found.length <= shown;
  }
  function open(item) {
    $("b-title").textContent = item.id;
    $("b-facts").textContent = (item.label === null ? "no label" : "true class " + item.label) + "; " + said(item) + (data.maps[item.place] ? "" : "; its maps are not in this file") + (item.pixels === null ? "; its pixels are not in this file" : "");
    const views = $("b-views");
    views.replaceChildren();
    const plain = element("figure", "", views);
    paint(element("canvas", "", plain), item, null, 160);
    element("figcaption", "radiograph", plain);
    data.explainers.forEach(function (explainer, e) {
      const figure = element("figure", "", views), canvas = element("canvas", "", figure);
      canvas.setAttribute("role", "img"); canvas.setAttribute("aria-label", explainer.title);
      paint(canvas, item, e, 160);
      element("figcaption", explainer.title + (item.maps[e] === null ? " (no map to show)" : ""), figure);
      const table = element("table", "", figure);
      data.metrics.forEach(function (metric, m) { const row = element("tr", "", table); element("td", metric.title, row).style.textAlign = "left"; element("td", number(scoreOf(item, e, m), m), row); });
    });
    $("b-dialog").showModal();
  }
  const again = function () { shown = PAGE; render(); };
  document.querySelectorAll(".controls select, .controls input").forEach(function (control) { control.addEventListener("input", again); });
  $("b-reset").addEventListener("click", function () { setTimeout(again, 0); });
  $("b-more").addEventListener("click", function () { shown += PAGE; render(); });
  again();
})();
