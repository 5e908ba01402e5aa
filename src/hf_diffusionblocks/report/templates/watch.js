// Asks the server for the sections again and again, and replaces those that have changed.
"use strict";

const EVERY = 2000, AFTER_THE_END = 10000; // ms
const shown = {};

function put(id, html) {
  const section = document.getElementById(id);
  if (shown[id] === html || section === null) return;
  const open = [...section.querySelectorAll("details[open] > summary")].map((summary) => summary.textContent);
  section.innerHTML = html; // escaped by the server; the page's policy runs no script that is in it
  section.hidden = html === "";
  for (const summary of section.querySelectorAll("summary")) {
    if (open.includes(summary.textContent)) summary.parentElement.open = true;
  }
  shown[id] = html;
}

function announce(text) {
  const place = document.getElementById("announcement");
  if (place.textContent !== text) place.textContent = text;
}

async function refresh() {
  let wait = EVERY;
  try {
    const run = await (await fetch("state.json", { cache: "no-store" })).json();
    for (const [id, html] of Object.entries(run.sections)) put(id, html);
    document.querySelector("h1").textContent = run.name;
    document.title = run.title;
    announce(run.announcement);
    if (run.state === "finished") wait = AFTER_THE_END;
  } catch (error) {
    announce("the watch command has ended; this is what was last known");
    wait = AFTER_THE_END;
  }
  setTimeout(refresh, wait);
}

refresh();
