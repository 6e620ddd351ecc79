"""python build.py 07_limits: cells of /tmp/nb/07_limits.txt, separated by lines '%% md', '%% code', '%% code check', '%% params'."""
import re, sys
from pathlib import Path
import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
sys.path.insert(0, "/work/main")
stem = sys.argv[1]
old = nbformat.read("/work/main/notebooks/02_erm.ipynb", 4)
full = nbformat.read("/work/main/notebooks/04_finetune_sweep.ipynb", 4)
params = old.cells[1].source
cells = []
for part in re.split(r"^%% ", Path(f"/tmp/nb/{stem}.txt").read_text(), flags=re.M)[1:]:
    head, _, text = part.partition("\n")
    text = text.strip("\n")
    if head == "md": cells.append(new_markdown_cell(text))
    elif head.startswith("code"):
        cells.append(new_code_cell(text, metadata={"tags": ["nbval-check-output"]} if "check" in head else {}))
    elif head.startswith("params"):
        source = params
        for line in text.splitlines():   # "+ name = ..." appended; "- name" removed; "! name = value" replaced
            if line.startswith("- "): source = re.sub(rf"^{line[2:]} =.*\n?", "", source, flags=re.M)
            elif line.startswith("! "):
                name, _, value = line[2:].partition(" = ")
                source = re.sub(rf"^{name} = \S+", f"{name} = {value}", source, flags=re.M)
            else: source += "\n" + line
        cells.append(new_code_cell(source.rstrip(), metadata={"tags": ["parameters"]}))
for k, cell in enumerate(cells): cell.id = f"cell-{k}"
target = Path(f"/work/main/notebooks/{stem}.ipynb")
nb = new_notebook(cells=cells, metadata=old.metadata)
nb.nbformat_minor = old.nbformat_minor
nbformat.write(nb, target)
print(target, len(cells))
