"use strict";
// Keeps the page as the server would show it now. Without this script a reload does the same.
(() => {
  const main = document.getElementById("main");
  const news = document.getElementById("news");
  const url = main.dataset.live;
  if (!url) return;
  let source = null;
  let timer = 0;
  let asked = -1000;
  let sent = false;

  // What the reader has typed, picked or opened is kept. A text that was only shown is not: the
  // record may have another one now, and the form would send the old one.
  const digest = () => {
    const field = main.querySelector("input[name=digest]");
    return field && field.value;
  };
  const state = () => {
    const fields = new Map();
    for (const field of main.querySelectorAll("textarea, input[type=checkbox]")) {
      if (field.type === "checkbox") fields.set(field.id, field.checked);
      else if (field.value !== field.defaultValue) fields.set(field.id, field.value);
    }
    const open = [...main.querySelectorAll("details")].map((details) => details.open);
    return { fields, open, of: digest(), focus: document.activeElement && document.activeElement.id };
  };
  const restore = ({ fields, open, of, focus }) => {
    for (const [id, value] of fields) {
      const field = document.getElementById(id);
      if (!field || field.disabled) continue;
      // An edit is of the payload that was shown then.
      if (id === "payload" && of !== digest()) continue;
      if (field.type === "checkbox") field.checked = value;
      else field.value = value;
    }
    const all = [...main.querySelectorAll("details")];
    if (all.length === open.length) all.forEach((details, index) => { details.open = open[index]; });
    const focused = focus && document.getElementById(focus);
    if (focused) focused.focus({ preventScroll: true });
  };

  const refresh = async () => {
    if (sent) return;
    asked = performance.now();
    const response = await fetch(location.href, { cache: "no-store" }).catch(() => null);
    if (!response || !response.ok || sent) return;
    // Such as to the page to sign in, which says why.
    if (response.redirected) return location.replace(response.url);
    const page = new DOMParser().parseFromString(await response.text(), "text/html");
    const next = page.getElementById("main");
    if (!next || sent) return;
    if (next.dataset.version === main.dataset.version) {
      // Nothing but time has passed.
      const now = next.querySelectorAll("time");
      main.querySelectorAll("time").forEach((time, index) => {
        if (now[index]) time.textContent = now[index].textContent;
      });
      return;
    }
    const kept = state();
    main.replaceChildren(...next.childNodes);
    main.dataset.version = next.dataset.version;
    document.title = page.title;
    restore(kept);
    news.textContent = "The page shows what is on record now.";
  };
  // Once a second at most: what an agent does that runs wild is not to be asked for by every page.
  const soon = () => {
    clearTimeout(timer);
    timer = setTimeout(refresh, Math.max(150, asked + 1000 - performance.now()));
  };

  // A browser opens six connections to a server, so hidden tabs hold none.
  const follow = () => {
    if (document.hidden) {
      if (source) source.close();
      source = null;
    } else if (!source) {
      source = new EventSource(url);
      source.onopen = soon;
      source.onmessage = soon;
    }
  };
  main.addEventListener("submit", () => { sent = true; });
  window.addEventListener("pageshow", () => { sent = false; follow(); });
  window.addEventListener("pagehide", () => { if (source) source.close(); source = null; });
  document.addEventListener("visibilitychange", follow);
  setInterval(() => { if (!document.hidden) soon(); }, 60000);
  follow();
})();
