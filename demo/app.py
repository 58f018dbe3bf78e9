"""Chat about images in the browser: one process, on this machine only.

    python demo/app.py                                  # the newest finished nano run
    python demo/app.py --model merged --port 7861       # a merged folder, a run folder, a hub name
    python demo/app.py --compare runs/other             # a second page compares both models blindly

The page is served on 127.0.0.1 and contacts no other server: no statistics, no fonts, no scripts, and a policy in every
answer that forbids the browser to load any. Only the pixels of images are stored, in a folder of this process; they are
shown only to the user who uploaded them, and deleted when their page is closed.
"""

from __future__ import annotations

import sys

from qllava.pages.server import main

if __name__ == "__main__":
    sys.exit(main())
