"""How frames travel between processes. Frames are opaque here; this package never imports ``protocol``."""
