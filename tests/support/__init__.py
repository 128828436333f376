"""What tests share: fakes, oracles and makers of small files, by subject."""
