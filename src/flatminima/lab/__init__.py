"""The lab: what trains, sweeps, reproduces and reports. It stands on the library, which never imports it."""
