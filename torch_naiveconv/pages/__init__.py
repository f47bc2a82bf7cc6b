"""Pages and pictures that show a call and its gradients by the library's own numbers.

Start reading at ``trace.py``, which computes everything that is shown; ``page.py`` puts it into one
HTML file (``page.html``, ``page.css``, ``page.js``), ``pictures.py`` into a PNG or a GIF.
"""
