"""What coordinator and owners exchange: keys, requests, deliveries and their parts."""
