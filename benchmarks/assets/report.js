// A click on a column's head sorts its table by that column; another one turns the order round.
for (const head of document.querySelectorAll("th")) {
  head.addEventListener("click", () => {
    const heads = [...head.parentNode.children];
    const column = heads.indexOf(head);
    const down = head.dataset.order === "up";
    for (const other of heads) delete other.dataset.order;
    head.dataset.order = down ? "down" : "up";
    const body = head.closest("table").tBodies[0];
    const rows = [...body.rows];
    const of = (row) => {
      const cell = row.cells[column];
      return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent;
    };
    rows.sort((a, b) => {
      const [x, y] = [of(a), of(b)];
      const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
      return down ? -order : order;
    });
    body.append(...rows);
  });
}
