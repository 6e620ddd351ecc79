import pandas as pd,glob
t=pd.concat([pd.read_csv(f) for f in glob.glob('/tmp/study/results/*/seed*/07_limits.csv')])
import re
t["configuration"]=t["configuration"].str.replace(r"_(finetune_(lr|schedule|batch_size)|accumulate|restart)=[^_]+","",regex=True)
print(t[["shortcut","seed","model","configuration","raw","biased","worst_group","gain","from_masks_alone","hidden_shortcut","hidden_digit"]].sort_values(["shortcut","seed"],kind="stable").round(3).to_string())
