"""Runs only the cells of 07-09 that read the committed tables, and saves their figures under /tmp/fig."""
import sys, nbformat, pandas as pd
sys.path.insert(0,'/work/main')
from masktune_utils import evaluation, plotting, selection
from masktune_utils.settings import REPOSITORY, Settings
from matplotlib.figure import Figure
import dataclasses
settings=Settings(dataset="mnist5k",directory="/tmp/fig")
ASK = "classes", "groups, held out", "groups"
names=["ERM","MaskTune","product (paper)","mean","mean, if they agree"]
pd.set_option('display.width',300); pd.set_option('display.max_columns',30)
for stem in ("07_limits","08_alternatives","09_selective"):
    nb=nbformat.read(f'/work/main/notebooks/{stem}.ipynb',4)
    for c in nb.cells:
        if c.cell_type=='code' and 'pd.read_csv' in c.source:
            lines=c.source.splitlines(); 
            src='\n'.join(lines)
            space=globals(); space['display']=lambda x: print(x.to_string() if hasattr(x,'to_string') else '')
            last=lines[-1]
            exec(src,space)
            if not last.startswith(('plotting',' ')) : 
                try: print(eval(last,space).to_string())
                except Exception as e: print('last:',last,e)
