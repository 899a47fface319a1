"""Messages between coordinator and owners: keys, requests, progress, deliveries and file parts."""
