import nbformat, sys, re
root='/tmp/w16/notebooks/'
def edit(stem, *pairs):
    p=root+stem+'.ipynb'; nb=nbformat.read(p,4)
    for a,b in pairs:
        hits=[c for c in nb.cells if a in c.source]
        assert len(hits)==1,(stem,a,len(hits))
        hits[0].source=hits[0].source.replace(a,b)
    nbformat.write(nb,p)
edit('01_dataset',
('''for name, split in {"train": sets.train, "test": sets.raw}.items():
    print(name, " / ".join(f"{count:,}" for count in split.labels.bincount().tolist()))''',
'''for name, split in {"train": sets.train, "test": sets.raw}.items():
    counts = split.labels.bincount().tolist()
    print(name, *[f"{count:,}" for count in counts], end="; ")
    print(f"the largest class has {max(counts) / min(counts):.2f} × the smallest")'''),
('''for name, split in sets._asdict().items():
    members''','''for name, split in ({"train": sets.train} | sets.tests).items():
    members'''),
('''for name, split in {"training": sets.train, "raw": sets.raw, "biased": sets.biased}.items():''','''for name, split in ({"training": sets.train} | sets.tests).items():'''),
('''for name in ("train", "biased"):
    split = getattr(sets, name)
    cheat''','''for name, split in {"train": sets.train, "biased": sets.biased}.items():
    cheat'''),
)
edit('02_erm',
('''pd.DataFrame({test: result["metrics"][test] for test in ("raw", "biased")}).loc[names].astype(
    float
).round(3)''','''metrics = pd.DataFrame({test: result["metrics"][test] for test in sets.tests})
metrics.loc[names].astype(float).round(3)'''),
('''print("biased accuracy below raw:", result["biased"] < result["raw"])
print("raw accuracy below training accuracy:", result["raw"] < history["accuracy"].iloc[-1])''',
'''first, *_, last = [result["metrics"][test]["accuracy"] for test in [*sets.tests] * 2]
print("biased accuracy below raw:", last < first)
print("raw accuracy below training accuracy:", first < history["accuracy"].iloc[-1])'''),
('''tests = {"raw": sets.raw, "biased": sets.biased}
correct = {
    name: evaluation.predict(base, split).argmax(1) == split.labels.cpu()
    for name, split in tests.items()
}''','''correct = {
    name: evaluation.predict(base, split).argmax(1) == split.labels.cpu()
    for name, split in sets.tests.items()
}'''),
('''wrong = {
    digit: (~correct["biased"] & (digits == digit)).nonzero()[:3, 0] for digit in accuracy.index
}
columns = {f"digit {digit}": sets.biased.images.cpu()[index] for digit, index in wrong.items()}
plotting.show(plotting.grid(columns, size=0.9), settings, "02_mistakes")
right = correct["raw"] & (sets.raw.labels.cpu() == 1)
print(
    f"{(right & ~correct['biased']).sum() / right.sum():.1%} of class 1 turn from right to wrong with the square"
)''','''*_, (test, split) = sets.tests.items()
wrong = {
    digit: (~correct[test] & (digits == digit)).nonzero()[:3, 0] for digit in accuracy.index
}
columns = {f"digit {digit}": split.images[index].cpu() for digit, index in wrong.items()}
plotting.show(plotting.grid(columns, size=0.9), settings, "02_mistakes")
if test == "biased":
    right = correct["raw"] & (sets.raw.labels.cpu() == 1)
    turned = (right & ~correct["biased"]).sum() / right.sum()
    print(f"{turned:.1%} of class 1 turn from right to wrong with the square")'''),
)
edit('04_finetune_sweep',
('''some = sets.biased[:1000]
''','''some = [*sets.tests.values()][-1][:1000]
'''),
('''print(f"{len(few)} images; accuracy on {len(some)} biased ones {right.double().mean():.2%}")''','''print(f"{len(few)} images; accuracy on {len(some)} test images {right.double().mean():.2%}")'''),
('''    rows[name] = {test: result[test] for test in ("raw", "biased")} | result["metrics"]["groups"]
''','''    rows[name] = {test: result[test] for test in sets.tests} | result["metrics"]["groups"]
'''),
('''gain = {test: after[test] - before[test] for test in ("raw", "biased")}
print("more accurate than ERM on the raw test set:", gain["raw"] > 0)
print("more accurate than ERM on the biased test set:", gain["biased"] > 0)''','''for test in sets.tests:
    print(f"more accurate than ERM on the {test} test set:", after[test] > before[test])'''),
('''for test in ("raw", "biased"):
    print(test, after''','''for test in sets.tests:
    print(test, after'''),
)
edit('05_plots',
('''print(f"ERM: {erm['raw']:.2%} raw, {erm['biased']:.2%} biased")''','''tests = [*sets.tests]
print("ERM:", ", ".join(f"{erm[test]:.2%} {test}" for test in tests))'''),
('''if name.startswith("raw_class_")]''','''if name.startswith(f"{tests[0]}_class_")]'''),
('''figure = Figure((max(6, 0.6 * len(groups)), 6.5), layout="constrained")
for ax, test in zip(figure.subplots(2, 1, sharex=True), ("raw", "biased"), strict=True):''','''figure = Figure((max(6, 0.6 * len(groups)), 0.5 + 3 * len(tests)), layout="constrained")
panels = figure.subplots(len(tests), sharex=True, squeeze=False)[:, 0]
for ax, test in zip(panels, tests, strict=True):'''),
('''average = own[["raw", "biased"]].mean(axis=1)''','''average = own[tests].mean(axis=1)'''),
('''places = range(0, 29 - settings.square_size, 2)''','''side = train.images.shape[-1]
places = range(0, side + 1 - settings.square_size, side // 14)'''),
('''    interact(put, row=(0, 27), column=(0, 27), size=(1, 28))''','''    interact(put, row=(0, side - 1), column=(0, side - 1), size=(1, side))'''),
)
# parameters
from importlib import util
import sys; sys.path.insert(0,'/tmp/w16')
from masktune_utils.settings import Settings
F=Settings.__pydantic_fields__
def line(n): return f"{n} = {F[n].default!r}  # {F[n].description}".replace("'",'"') if isinstance(F[n].default,str) else f"{n} = {F[n].default!r}  # {F[n].description}"
import glob
for p in sorted(glob.glob(root+'*.ipynb')):
    nb=nbformat.read(p,4)
    c=nb.cells[1]; assert 'parameters' in c.metadata.tags
    if p.endswith('06_study.ipynb'): continue
    out=[]
    for l in c.source.splitlines():
        name=l.split(' = ')[0]
        if name=='epochs':
            out+= [line('model'),line('weights'),line('flip')]
        if name in F and not l.startswith('#'):
            l=l.split('  # ')[0]+'  # '+F[name].description
        out.append(l)
        if name=='limit': out.append(line('image_size'))
    c.source='\n'.join(out); nbformat.write(nb,p)
