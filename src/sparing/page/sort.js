for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    const value = row => Number(row.cells[column].dataset.value);
    const text = row => row.cells[column].textContent;
    button.onclick = () => {
      const sign = head.ariaSort === "descending" ? 1 : -1;
      const rows = [...body.rows], numbers = rows.every(row => row.cells[column].hasAttribute("data-value"));
      rows.sort((a, b) => sign * (numbers ? value(a) - value(b) : text(a).localeCompare(text(b))));
      heads.forEach(other => other.ariaSort = null);
      head.ariaSort = sign > 0 ? "ascending" : "descending";
      body.append(...rows);
    };
  });
}
