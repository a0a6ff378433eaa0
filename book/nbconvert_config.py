"""How `make execute` writes notebooks: without what changes from run to run."""

c = get_config()  # noqa: F821 (nbconvert provides it)

c.NbConvertApp.export_format = "notebook"
c.NbConvertApp.log_level = "WARN"
c.NbConvertApp.use_output_suffix = False  # write in place
c.ExecutePreprocessor.enabled = True
c.ExecutePreprocessor.record_timing = False
c.ClearMetadataPreprocessor.enabled = True
c.ClearMetadataPreprocessor.preserve_cell_metadata_mask = {"tags", "mystnb"}
c.ClearMetadataPreprocessor.preserve_nb_metadata_mask = {
    "kernelspec",
    ("language_info", "name"),
}
