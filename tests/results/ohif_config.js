// The viewer's configuration in tests: one DICOMweb source of the same origin, and a hanging protocol with the four views.
const views = ["RCC", "LCC", "RMLO", "LMLO"];

const selector = (view) => ({
  studyMatchingRules: [],
  seriesMatchingRules: [{ weight: 10, attribute: "vitmodelView", constraint: { equals: { value: view } }, required: true }],
});

const viewport = (view) => ({
  viewportOptions: { toolGroupId: "default", viewportId: view, allowUnmatchedView: true },
  displaySets: [{ id: view }],
});

const protocol = {
  id: "fourViews",
  name: "Four views",
  protocolMatchingRules: [{ weight: 1000, attribute: "ModalitiesInStudy", constraint: { contains: ["MG"] }, required: true }],
  toolGroupIds: ["default"],
  displaySetSelectors: Object.fromEntries(views.map((view) => [view, selector(view)])),
  stages: [{
    name: "four views",
    viewportStructure: { layoutType: "grid", properties: { rows: 1, columns: 4 } },
    viewports: views.map(viewport),
  }],
  numberOfPriorsReferenced: 0,
};

window.config = {
  routerBasename: "/",
  modes: [],
  customizationService: {},
  showStudyList: true,
  investigationalUseDialog: { option: "never" },
  maxNumberOfWebWorkers: 1,
  showWarningMessageForCrossOrigin: false,
  showCPUFallbackMessage: false,
  strictZSpacingForVolumeViewport: true,
  defaultDataSourceName: "dicomweb",
  dataSources: [{
    namespace: "@ohif/extension-default.dataSourcesModule.dicomweb",
    sourceName: "dicomweb",
    configuration: {
      friendlyName: "test", name: "test", wadoUriRoot: "/dicom-web", qidoRoot: "/dicom-web", wadoRoot: "/dicom-web",
      qidoSupportsIncludeField: true, imageRendering: "wadors", thumbnailRendering: "wadors", enableStudyLazyLoad: true,
      supportsFuzzyMatching: false, supportsWildcard: true, omitQuotationForMultipartRequest: true,
      bulkDataURI: { enabled: true },
    },
  }],
  extensions: [{
    id: "vitmodel.test",
    preRegistration({ servicesManager }) {
      window.services = servicesManager.services; // for the test
      servicesManager.services.hangingProtocolService.addCustomAttribute("vitmodelView", "side and view", (displaySet) => {
        const image = displaySet.images?.[0] || displaySet.instances?.[0] || displaySet.instance;
        if (image?.Modality !== "MG") return undefined;
        return `${image.ImageLaterality || image.Laterality || ""}${image.ViewPosition || ""}`;
      });
    },
    getHangingProtocolModule: () => [{ name: protocol.id, protocol }],
  }],
};
