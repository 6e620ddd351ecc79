import nbformat, re, pathlib
names={"01_dataset":"1 the data","02_erm":"2 ERM","03_saliency_masks":"3 saliency and masks","04_finetune_sweep":"4 fine-tuning","05_plots":"5 this run","06_study":"6 the study","07_limits":"7 limits","08_alternatives":"8 alternatives","09_selective":"9 abstaining"}
for p in sorted(pathlib.Path('/work/main/notebooks').glob('0*.ipynb')):
    nb=nbformat.read(p,4)
    line="**The series:** "+" · ".join(t if s==p.stem else f"[{t}]({s}.ipynb)" for s,t in names.items())
    src=nb.cells[0].source
    new=re.sub(r"\*\*The series:\*\*.*",lambda m:line,src)
    assert "The series" in src
    nb.cells[0].source=new
    nbformat.write(nb,p)
for s in ("07_limits","08_alternatives","09_selective"):
    p=pathlib.Path(f'/tmp/nb/{s}.txt'); t=p.read_text()
    line="**The series:** "+" · ".join(x if k==s else f"[{x}]({k}.ipynb)" for k,x in names.items())
    p.write_text(re.sub(r"\*\*The series:\*\*.*",lambda m:line,t,count=1))
