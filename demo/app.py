"""A chat about images in the browser: one process, on this machine only.

    python demo/app.py                                  # the newest finished nano run
    python demo/app.py --model merged --port 7861       # a merged folder, a run folder, a hub name
    python demo/app.py --compare runs/other             # its second page puts questions to both, blindly

The page is served on 127.0.0.1 and asks nobody else for anything: no statistics, no fonts, no scripts from elsewhere,
and a policy in every answer of the server that forbids the browser to. Of images only the pixels are kept, in a folder
of this process; they are shown to nobody but who uploaded them, and deleted when their page is closed.
"""

from __future__ import annotations

import sys

from qllava.pages.server import main

if __name__ == "__main__":
    sys.exit(main())
