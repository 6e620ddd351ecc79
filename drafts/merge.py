import pandas as pd, sys
from masktune_utils import store
ref=pd.read_csv('/work/main/results/reference.csv'); cols=list(ref.columns); n=len(ref)
new=store.collect('/tmp/ref')
print(new.groupby(['experiment','seed']).size())
for c in cols:
    if c not in new: print('missing', c); new[c]=None
print('extra', [c for c in new if c not in cols])
new=new[cols]
old=ref.set_index(store.KEY)
drop=[]
for i,row in new.iterrows():
    key=tuple(row[k] for k in store.KEY)
    if key in old.index:
        same=old.loc[key]
        print('known', key, same['raw'], row['raw'], same['biased'],row['biased'])
        drop.append(i)
keep=new.drop(index=drop)
# scores of the base models that are known already
for i in drop:
    key=tuple(new.loc[i,k] for k in store.KEY)
    mask=(ref['experiment']==key[0])&(ref['configuration']==key[1])&(ref['seed']==key[2])
    assert mask.sum()==1
    if pd.isna(ref.loc[mask,'score']).all(): ref.loc[mask,'score']=new.loc[i,'score']
out=pd.concat([ref,keep.round(6).astype(object)],ignore_index=True)
def order(t): return t.sort_values(store.KEY,key=lambda c:c if c.name=='seed' else c.replace('base',''),ignore_index=True)
print('sorted before:', order(ref)[store.KEY].equals(ref[store.KEY]))
out=order(out)
print(n,len(out))
for c in ('dilation','iterations','finetune_batch_size','limit'):
    out[c]=out[c].astype('float').astype('Int64')
if len(sys.argv)>1: out.to_csv('/work/main/results/reference.csv',index=False)
