import numpy as np, sys
from pathlib import Path
from PIL import Image
rng=np.random.default_rng(0)
root=Path('/tmp/pets')
for part,n in (('train',60),('test',20)):
    for k,c in enumerate(('cats','dogs')):
        for g,share in (('plain',.1 if (k==0)==(part=='train') else .9),('marked',.9 if (k==0)==(part=='train') else .1)):
            d=root/part/c/(g if part=='test' else ''); d.mkdir(parents=True,exist_ok=True)
            for i in range(int(n*share)):
                a=rng.integers(0,255,(40,50,3),dtype=np.uint8)//2+(60*k)
                if g=='marked': a[:8,:8]=255
                Image.fromarray(a.astype(np.uint8)).save(d/f'{g}{i}.png')
