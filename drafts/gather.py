import pandas as pd,glob,sys
for stem in ("07_limits","08_alternatives","09_selective"):
    files=[f for f in sorted(glob.glob(f'/tmp/study/results/*/seed*/{stem}.csv')) if '/seed0/' not in f]
    pd.concat([pd.read_csv(f) for f in files]).to_csv(f'/tmp/save/{stem}.csv',index=False)
    print(stem,len(files))
