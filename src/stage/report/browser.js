(() => {
  const controls = document.getElementById("controls");
  if (!controls) return;
  const cards = [...document.querySelectorAll(".card")];
  const search = document.getElementById("search");
  const nothing = document.getElementById("nothing");
  const buttons = [...controls.querySelectorAll("button")];
  const more = document.getElementById("more");
  const first = 12;
  let wanted = "", all = cards.length <= first;
  const update = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const card of cards) {
      const text = card.textContent.toLowerCase();
      const fits = (!wanted || card.dataset.class === wanted) && words.every(w => text.includes(w));
      const room = all || wanted || words.length || shown < first;
      card.hidden = !(fits && room);
      shown += fits && room ? 1 : 0;
    }
    nothing.hidden = shown > 0;
    more.hidden = all || Boolean(wanted) || words.length > 0;
  };
  for (const button of buttons) {
    if (button.dataset.filter && !cards.some(c => c.dataset.class === button.dataset.filter)) { button.hidden = true; continue; }
    button.addEventListener("click", () => {
      wanted = button.dataset.filter;
      for (const b of buttons) b.setAttribute("aria-pressed", String(b === button));
      update();
    });
  }
  more.firstElementChild.addEventListener("click", () => { all = true; update(); });
  search.addEventListener("input", update);
  controls.hidden = false;
  update();
})();
