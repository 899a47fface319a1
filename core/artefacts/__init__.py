"""Files of artefacts: written atomically, digested, described by manifests."""
