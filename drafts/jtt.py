"""Replaces the rows of JTT and GroupDRO in 08_alternatives.csv by those of /tmp/study_jtt."""
import pandas as pd,glob
old=pd.read_csv('/tmp/save/08_alternatives.csv')
new=pd.concat([pd.read_csv(f) for f in sorted(glob.glob('/tmp/study_jtt/results/*/seed[2-6]/08_alternatives.csv'))])
keep=old[~old.method.isin(["JTT","GroupDRO"])]
out=pd.concat([keep,new[old.columns]]).sort_values(["placement","seed","asks for","method"],key=lambda c: c if c.name!="placement" else c.map({"random":0,"ordered":1}),ignore_index=True)
print(len(old),len(new),len(out)); out.to_csv('/work/main/results/08_alternatives.csv',index=False)
