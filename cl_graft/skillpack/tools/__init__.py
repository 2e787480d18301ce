"""What people do with packs: compare two, export one to another format."""
