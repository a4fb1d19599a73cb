"""The sections of a config, one a file. `kdray.config` puts them together and is where they are imported from."""
