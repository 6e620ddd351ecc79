import sys, base64, nbformat
nb=nbformat.read(sys.argv[1],4); out=sys.argv[2]; k=0
for c in nb.cells:
    if c.cell_type!="code": continue
    for o in c.outputs:
        d=o.get("data",{})
        if "image/png" in d:
            open(f"{out}_{k}.png","wb").write(base64.b64decode(d["image/png"])); print(f"[image {out}_{k}.png]"); k+=1
        elif "text/plain" in d: print(d["text/plain"])
        elif "text" in o: print(o["text"].rstrip())
