"""The coordinator: requests experts from owners, judges deliveries and keeps the accepted ones."""
