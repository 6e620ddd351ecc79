exec(open('/tmp/nb/edit16.py').read().split("edit('01_dataset'")[0])
edit('02_erm',
('''digits = sets.raw.digits.cpu()
''','''digits, names = sets.raw.digits.cpu(), sets.raw.names or range(10)
'''),
('''accuracy.plot.bar(ax=ax, rot=0, color=colors, xlabel="digit", ylabel="accuracy (%)", legend=False)''','''shown = accuracy.rename(index=lambda digit: names[digit])
kind = "group" if sets.raw.names else "digit"
shown.plot.bar(ax=ax, rot=0, color=colors, xlabel=kind, ylabel="accuracy (%)", legend=False)'''),
('''columns = {f"digit {digit}": split.images[index].cpu() for digit, index in wrong.items()}''','''columns = {f"{kind}\\n{names[digit]}": split.images[k].cpu() for digit, k in wrong.items()}'''),
)
