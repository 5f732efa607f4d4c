// What a reader does: run inside the report by tests/test_report.py; the findings end up in #probe.
window.addEventListener("error", function (e) { document.body.dataset.errors = (document.body.dataset.errors || "") + e.message; });
window.addEventListener("load", function () { setTimeout(function () {
  const out = {}, table = document.querySelector("#scores table.sortable"), button = table.tHead.rows[0].cells[1].querySelector("button");
  const keys = function () { return Array.from(table.tBodies[0].rows).map(function (r) { return Number(r.cells[1].dataset.key); }); };
  button.focus(); out.focused = document.activeElement === button;
  button.click(); out.up = keys(); out.sortedUp = table.tHead.rows[0].cells[1].getAttribute("aria-sort");
  button.click(); out.down = keys(); out.sortedDown = table.tHead.rows[0].cells[1].getAttribute("aria-sort");
  const set = function (id, value) { const e = document.getElementById(id); e.value = value; e.dispatchEvent(new Event("input", { bubbles: true })); };
  const cards = function () { return Array.from(document.querySelectorAll("#b-cards .card")).map(function (c) { return c.dataset.id; }); };
  const count = function () { return document.getElementById("b-count").textContent; };
  out.all = count(); out.best = cards();
  set("b-order", "worst"); out.worst = cards();
  set("b-order", "name"); set("b-label", "Normal"); out.normal = cards(); out.normalCount = count();
  set("b-outcome", "wrong"); out.wrong = cards();
  document.getElementById("b-reset").click();
  setTimeout(function () {
    set("b-metric", "3"); set("b-low", "0.9"); out.hits = count(); set("b-low", "");
    set("b-text", "0001"); out.named = cards(); set("b-text", "");
    document.getElementById("b-more").click(); out.more = cards().length;
    document.querySelector("#b-cards .card").click();
    out.open = document.getElementById("b-dialog").open; out.views = document.querySelectorAll("#b-views figure").length;
    const group = document.getElementById("group"); group.value = "1"; group.dispatchEvent(new Event("change"));
    out.visible = Array.from(document.querySelectorAll('[data-group="score-group"]')).filter(function (e) { return !e.hidden; }).map(function (e) { return e.dataset.value; });
    setTimeout(function () {
      out.canvas = Array.from(document.querySelectorAll("#b-views canvas")).map(function (c) { return c.toDataURL("image/png"); });
      out.size = [document.documentElement.scrollWidth, window.innerWidth]; out.broken = window.broken;
      const note = document.createElement("pre"); note.id = "probe"; note.textContent = JSON.stringify(out); document.body.appendChild(note);
    }, 400);
  }, 50);
}, 200); });
