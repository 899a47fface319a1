"""Federations: owners train experts on private text and deliver only weights. Independent of the transport."""
