"""Reports as one HTML file that opens offline: the page with its style and policy, tables, and pictures as inline SVG.

`guanaco compare` and `guanaco bench serve` write their reports with it. It knows nothing of what is reported, and
imports nothing of ours. Start with `page.py`; `pictures.py` has intervals and bars, `plots.py` curves over two axes.
"""
