"""What may break: damaged files, lost launchers, a full machine."""
