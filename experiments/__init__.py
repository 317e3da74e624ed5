"""Commands that train, compare and measure; they need the extra ``train``."""

from wsbcn_flax._extras import require

for _module in ("tyro", "rich"):
    require(_module, extra="train")
