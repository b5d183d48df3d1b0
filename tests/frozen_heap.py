"""
Preloaded last by the fork server, whose workers inherit 400,000 objects: frozen, they are left out of every
collection, so that a worker's first one does not copy their memory page by page.
"""

import gc

gc.collect()
gc.freeze()
OBJECTS = gc.get_freeze_count()
