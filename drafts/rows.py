import pandas as pd
from masktune_utils import evaluation, selection, store
t=pd.read_csv('/work/main/results/reference.csv')
tuned=t[t["chosen"].notna()&(t["validation_share"]==0)]
best=tuned.loc[tuned.groupby(["experiment","seed"])["worst_group"].idxmax()]
LIN="_finetune_lr=0.02_finetune_schedule=linear"
def s(rows): return evaluation.summarize(rows,["experiment"],["worst_group"])["worst group"].iloc[0] if len(rows) else ''
for e in ("mnist_placement=ordered_epochs=20","mnist_square_size=4_square_color=red_placement=ordered_epochs=20"):
    own=t[t["experiment"]==e]; tu=tuned[tuned["experiment"]==e]
    cells=[own[own["configuration"]=="base"],own[own["configuration"]=="mean_std_2.0_finetune_lr=0.01"],tu[tu["configuration"]==f"mean_std_3.5_dilation=3{LIN}_finetune_batch_size=32"],tu[tu["chosen"].eq(True)],best[best["experiment"]==e]]
    ch=tu[tu["chosen"].eq(True)]
    print(f"| `{e}` | "+" | ".join(s(c) for c in cells)+f" | 99.25 ± 0.15 | {(ch['gain']<selection.LITTLE).sum()} of {len(ch)} |")
    print(evaluation.summarize(ch,["experiment"]).to_string()); print(ch[["seed","configuration","worst_group"]].to_string()); print(best[best["experiment"]==e][["seed","configuration","worst_group"]].to_string())
