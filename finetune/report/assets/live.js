"use strict";
// Follows the run: asks the server that it came from for its version, and takes the new page over when it is another.
{
  const say = (text) => { document.querySelector("#following").textContent = text; };
  const kept = () => {
    const slider = document.querySelector("#slider");
    return slider && { at: slider.value, all: document.querySelector("#all").getAttribute("aria-pressed") === "true" };
  };
  const take = async () => {
    const page = new DOMParser().parseFromString(await (await fetch("/")).text(), "text/html");
    const open = new Set([...document.querySelectorAll("details[open] > summary")].map((one) => one.textContent));
    const before = kept(), focused = document.activeElement && document.activeElement.id;
    for (const one of page.querySelectorAll("details > summary")) one.parentElement.open = open.has(one.textContent);
    document.title = page.title;
    document.querySelector("header.top").replaceWith(page.querySelector("header.top"));
    document.querySelector("main").replaceWith(page.querySelector("main"));
    window.startGrid(before);
    const again = focused && document.getElementById(focused);
    if (again) again.focus({ preventScroll: true });
  };
  const ask = async () => {
    try {
      const version = await (await fetch("/version")).text();
      if (version !== document.querySelector("main").dataset.version) await take();
      say(", follows the run");
    } catch {
      say(", does not follow the run any more: the server has ended");
    }
    setTimeout(ask, 2000);
  };
  ask();
}
